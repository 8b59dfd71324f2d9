"""AlignMLP: the ATAC embedding of a cell, brought into the space in which the vector field lives.

    z_A = LayerNorm(W2 Dropout(GELU(LayerNorm(W1 z_ATAC))))

Shapes  z_atac (B, 256) -> z_A (B, 512)
Ref     specification, "Nonlinear ATAC alignment"
"""
from torch import nn


class AlignMLP(nn.Module):
    def __init__(self, in_dim=256, out_dim=512, hidden=512):
        super().__init__()
        self.args = dict(in_dim=in_dim, out_dim=out_dim, hidden=hidden)     # saved with the weights
        self.net = nn.Sequential(
            nn.Linear(in_dim, hidden), nn.LayerNorm(hidden), nn.GELU(),
            nn.Dropout(0.1), nn.Linear(hidden, out_dim), nn.LayerNorm(out_dim),
        )

    def forward(self, z_atac):
        return self.net(z_atac)                             # (B, in_dim) -> (B, out_dim)
