# /// attack
# threats = ["G50", "G52", "B11"]
# gains = "accepted"
# record = "normuon"
# claim = 138
# naive = "one run"
# ///
"""An honest program, submitted with a claim somewhat too small until it is lucky."""
