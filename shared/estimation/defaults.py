"""Defaults of every recipe setting: what "auto" becomes. Pure numbers and functions of them."""

from __future__ import annotations

#: About as many tokens has a packed row where examples are shorter. Attention between documents is computed and masked
#: away, so long rows of short documents waste it: with rows of 30 tokens, SmolLM2-135M on 2 cores trained 518 tokens/s
#: at 128, 473 at 256.
PACK_LENGTH = 128
