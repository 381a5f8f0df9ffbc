"""The reference trainer: the real loop with the books kept. Read in this order, one sitting:

config      what may stand in the TOML file                    data        seeded samples of text, or synthetic
step        one optimizer update, on real or fake tensors      forecast    that step traced; what will not fit refused
checkpoint  saved whole or not at all                          log         losses written down, lost ones told
loop        all of it together

Below it: `bursar.ranks` the processes, `bursar.files` what is whole on disk, `bursar.meter` a step measured.
"""
