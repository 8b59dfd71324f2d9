"""Both encoders against their references, one after the other on the same machine: items per second and ratio.

scGPT at 300, 1,200 and real token numbers (bench_scgpt.py), HyenaDNA at 500, 501, 1,000 and mixed bp
(bench_hyenadna.py), random weights of the released sizes, with the achieved share of a large matrix product.

Run     python benchmarks/bench_encoders.py --threads 1            about 4 minutes on one free core
"""
import argparse
import subprocess
import sys
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    for name in ("bench_scgpt.py", "bench_hyenadna.py"):
        print(f"--- {name}", flush=True)
        subprocess.run([sys.executable, "-W", "ignore", Path(__file__).with_name(name), "--threads", args.threads,
                        "--device", args.device], check=True)


if __name__ == "__main__":
    main()
