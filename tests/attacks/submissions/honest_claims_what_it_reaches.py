# /// attack
# threats = []
# gains = ""
# record = "normuon"
# claim = 155
# naive = "ten runs"
# ///
"""The anchor, with steps to spare."""
