# /// attack
# threats = ["G53", "D21"]
# gains = "accepted"
# tier = "nano-wallclock"
# record = "adamw"
# naive = "one pair"
# ///
"""The start record once more, submitted until it happens to be timed faster than itself."""
