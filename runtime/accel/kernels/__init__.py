"""The kernels: `schedule` (work list), `attend` and `attend_wide` (partial attention), `merge`.

Split attention after T. Dao et al., "Flash-Decoding" (2023), with log2 softmax after FlashAttention
(arXiv 2205.14135); reading a shared prefix once for all its sequences after J. Juravsky et al.,
"Hydragen" (arXiv 2402.05099), on a tree as in J. Yao et al., "DeFT" (arXiv 2404.00242).

Two choices matter most on Hopper. The page id of the next tile is loaded one iteration ahead, so
that the software pipeliner spends its stages on K and V and not on the page table. And the rows of
a tile are packed densely, row `r` = query `r // GROUP`, head `r % GROUP` of the group: any ratio of
query to KV heads, also 7, fills the tile.

Shapes and strides are documented once, at `sagellm_ir.runtime.accel.attention.PrefixAttention`.
"""

from sagellm_ir.runtime.accel.kernels.attend import attend
from sagellm_ir.runtime.accel.kernels.merge import merge
from sagellm_ir.runtime.accel.kernels.schedule import schedule
from sagellm_ir.runtime.accel.kernels.wide import attend_wide
from sagellm_ir.runtime.accel.kernels.wide_copies import PAGE, SPAN

__all__ = ["PAGE", "SPAN", "attend", "attend_wide", "merge", "schedule"]
