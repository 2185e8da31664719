"""How much a kernel holds at once. Without torch, so that a plan can name it before any is there."""

# Logits of a stretch of rows: on a CPU few enough to stay near its caches, on a GPU enough rows for its products
LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**26}
# Where a CPU emulates narrow products, they are made in float32; for fewer rows, widening the weight costs more than it saves
ENOUGH_ROWS = 16
