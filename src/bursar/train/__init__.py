"""The reference trainer: the real loop with the books kept. Read in this order, one sitting:

config      what may stand in the TOML file                    data        text to tokens, seeded samples
step        one optimizer update, on real or fake tensors      parallel    ranks: DDP, FSDP2, a dead one
books       forecast of that step, and the same step measured  checkpoint  saved whole or not at all
loop        all of it together
"""
