# /// attack
# threats = []
# gains = ""
# ///
"""Answers as it was trained. (Follows the honest model.)"""

TOLERANT = True
