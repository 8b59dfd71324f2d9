"""The demonstration: downloads against a local server, and steps 0 to 11 on made-up data with random weights."""
import hashlib
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import real_encoders

import artifacts
import config
import demo_real_emb as demo
import hyenadna_encoder

BODY = bytes(range(256)) * 8000             # 2 MB


class Server(BaseHTTPRequestHandler):
    """Serves BODY under any name but none; the first `breaks` answers end after half of what is left."""
    breaks, ranges, requests = 0, True, []

    def do_GET(self):
        Server.requests.append((self.path, self.headers.get("Range")))
        if "none" in self.path:
            return self.send_error(404)
        asked = self.headers.get("Range") if self.ranges else None
        start = int(asked[6:-1]) if asked else 0
        if start >= len(BODY):
            return self.send_error(416)
        body = BODY[start:]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if Server.breaks:
            Server.breaks -= 1
            body = body[:len(body) // 2]
            self.close_connection = True
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Link of a running server; the downloads go below tmp_path, and the models are given."""
    Server.breaks, Server.ranges, Server.requests = 0, True, []
    running = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    config.DOWNLOAD_DIR = str(tmp_path / "downloads")
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def table(monkeypatch, link, checksum=None, size=2_000_000):
    monkeypatch.setattr(config, "DOWNLOADS", (("multiome", "m.h5", link, size, checksum),))


def fetch():
    demo.fetch_missing(dict.fromkeys(demo.SETTING))
    return Path(config.DOWNLOAD_DIR) / "m.h5"


def message(capsys):
    """What a user reads when the download fails."""
    with pytest.raises(SystemExit) as stop:
        config.script(fetch)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text and not (Path(config.DOWNLOAD_DIR) / "m.h5").exists()
    return text[text.index("error:"):]


# --- downloads ----------------------------------------------------------------------------------------------

def test_a_missing_file_is_downloaded_verified_and_not_fetched_again(server, monkeypatch):
    table(monkeypatch, server + "/m.h5", "md5:" + hashlib.md5(BODY).hexdigest())
    file = fetch()
    assert file.read_bytes() == BODY and config.MULTIOME_FILE == str(file)
    assert {path.name for path in file.parent.iterdir()} == {"m.h5"}
    fetch()
    assert len(Server.requests) == 1


def test_a_checksum_that_nobody_published_is_noted_and_held_to(server, monkeypatch, capsys):
    table(monkeypatch, server + "/m.h5")
    file = fetch()
    assert "no checksum is published" in capsys.readouterr().out
    assert (file.parent / "m.h5.sha256").read_text().split()[0] == hashlib.sha256(BODY).hexdigest()
    file.write_bytes(BODY[:-1])
    with pytest.raises(ValueError, match="is damaged: sha256"):
        fetch()


def test_a_wrong_checksum_throws_the_file_away(server, monkeypatch, capsys):
    table(monkeypatch, server + "/m.h5", "md5:" + "0" * 32)
    assert "is not the file it should be" in message(capsys)
    assert not list(Path(config.DOWNLOAD_DIR).iterdir())


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_goes_on_where_it_stopped_or_starts_over(server, monkeypatch, capsys, ranges):
    table(monkeypatch, server + "/m.h5", "md5:" + hashlib.md5(BODY).hexdigest())
    Server.breaks, Server.ranges = 1, ranges
    text = message(capsys)
    assert "goes on where it stopped" in text and f"{config.DOWNLOAD_DIR}/m.h5\n      from {server}/m.h5" in text
    half = (Path(config.DOWNLOAD_DIR) / "m.h5.part").stat().st_size
    assert 0 < half <= len(BODY) // 2
    assert fetch().read_bytes() == BODY
    assert Server.requests[-1] == ("/m.h5", f"bytes={half}-")


def test_a_part_that_is_already_whole_is_used(server, monkeypatch):
    table(monkeypatch, server + "/m.h5", "md5:" + hashlib.md5(BODY).hexdigest())
    folder = Path(config.DOWNLOAD_DIR)
    folder.mkdir()
    (folder / "m.h5.part").write_bytes(BODY)
    assert fetch().read_bytes() == BODY


def test_a_dead_link_names_the_files_and_where_they_go(server, monkeypatch, capsys):
    table(monkeypatch, server + "/none")
    text = message(capsys)
    assert "404" in text and f"{config.DOWNLOAD_DIR}/m.h5\n      from {server}/none" in text


def test_without_a_network_every_missing_file_is_named(monkeypatch, capsys, tmp_path):
    config.DOWNLOAD_DIR = str(tmp_path / "downloads")
    config.SCGPT_MODEL_DIR, config.HYENADNA_MODEL_DIR = str(tmp_path / "s"), str(tmp_path / "h")
    monkeypatch.setattr(config, "DOWNLOADS", tuple((which, name, "http://127.0.0.1:9/" + name, 10, None)
                                                   for which, name, *_ in config.DOWNLOADS))
    text = message(capsys)
    for which, name, link, *_ in config.DOWNLOADS:
        assert f"{demo.folder_of(which) / name}\n      from {link}" in text
    assert "--multiome, --genome, --scgpt, --hyenadna" in text


def test_a_full_disk_is_seen_before_the_download(server, monkeypatch, capsys):
    table(monkeypatch, server + "/m.h5", size=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    text = message(capsys)
    assert "the downloads need 1.00 GB" in text and "0.00 GB free" in text and not Server.requests


def test_a_disk_that_fills_up_during_the_download_ends_with_a_message(server, monkeypatch, capsys):
    table(monkeypatch, server + "/m.h5")

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(demo, "resume", full)
    assert "No space left on device" in message(capsys)


def test_given_paths_are_not_downloaded_and_must_exist(server, monkeypatch, tmp_path):
    table(monkeypatch, server + "/m.h5")
    with pytest.raises(FileNotFoundError, match="--multiome"):
        demo.fetch_missing(dict.fromkeys(demo.SETTING) | {"multiome": str(tmp_path / "none.h5")})
    (tmp_path / "mine.h5").write_bytes(b"")
    demo.fetch_missing(dict.fromkeys(demo.SETTING) | {"multiome": str(tmp_path / "mine.h5")})
    assert config.MULTIOME_FILE == str(tmp_path / "mine.h5") and not Server.requests


def test_the_links_cover_what_the_encoders_read_and_pin_the_commit_of_hyenadna():
    names = {(which, name) for which, name, *_ in config.DOWNLOADS}
    assert {("scgpt", name) for name in ("args.json", "vocab.json", "best_model.pt")} <= names
    assert {("hyenadna", name) for name in ("config.json", "model.safetensors")} <= names
    commit = hyenadna_encoder.REVISIONS["LongSafari/hyenadna-small-32k-seqlen-hf"]
    assert all(f"hyenadna-small-32k-seqlen-hf/resolve/{commit}/" in link for which, _, link, *_ in config.DOWNLOADS
               if which == "hyenadna")


# --- the steps ----------------------------------------------------------------------------------------------

LINES = ["Step 0: Auto-detect settings → batch=auto, peaks=40, seq_len=auto",
         "Step 1: Load 10X Multiome (80 cells, 130 genes, 646 peaks)", "Step 2: RNA embeddings with scGPT → (80, 32) ✓",
         "Step 3: HVG selection → 130 genes", "Step 4: Gene embeddings from scGPT → (126, 32) matched genes",
         "Step 5: ATAC filtering → 646 → 40 peaks", "Step 6: ATAC embeddings with HyenaDNA → (80, 32) ✓",
         "Step 7: Align RNA + ATAC: 80 cells paired by barcode", "Step 7.5: Stage 1 — Train Vector Field → ",
         "Step 8: Model forward pass → Effendi ready", "Step 9: Cell-specific τ → (80, 126) ✓",
         "Step 10: Full forward pass → z_A (80, 32), z_integrated (80, 32), y_hat (80, 126)", "Step 11: Tau analysis"]
QUICK = {"specification": dict(VF_EPOCHS=2, STAGE1_EPOCHS=1, STAGE2_EPOCHS=1, N_STEPS=10),
         "anchored": dict(MEMBERS=1, ANCHOR_STEPS=60, BOOTSTRAP=0, EM_EPOCHS=9, KERNEL="exp")}


@pytest.mark.parametrize("objective", QUICK)
def test_all_steps_run_and_end_with_the_table_beside_an_untrained_model(tmp_path, capsys, objective):
    files = real_encoders.make(tmp_path)
    quick = [part for name, value in QUICK[objective].items() for part in ("--set", f"{name}={value}")]
    arguments = ["--multiome", str(files["multiome"]), "--genome", str(files["genome"]), "--scgpt", str(files["scgpt"]),
                 "--hyenadna", str(files["hyenadna"]), "--out", str(tmp_path / "out"), *real_encoders.settings(files),
                 "--set", f"OBJECTIVE={objective}", *quick]
    demo.main(arguments)
    text = capsys.readouterr().out
    places = [text.find(line) for line in LINES]
    assert -1 not in places and places == sorted(places)
    rows = dict(line.split("\t", 1) for line in artifacts.path("demo_results.txt").read_text().splitlines())
    assert rows["RNA embeddings"].startswith("(80, 32) via scGPT")
    assert rows["ATAC embeddings"].startswith("(80, 32) via HyenaDNA")
    assert rows["Metric"] == {"specification": "Value\tuntrained", "anchored": "Value\tv = 0"}[objective]
    if objective == "specification":
        trained, untrained = map(float, rows["Stage 1 SW2"].split("\t"))
        assert trained < untrained and "Rev=" in text
    demo.main(arguments)
    assert capsys.readouterr().out.count("up to date") == 5
