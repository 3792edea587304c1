# /// attack
# threats = ["E29", "A4"]
# gains = "score"
# ///
"""Patches what turns logits into losses. (Follows the honest model.)"""

import __main__

__main__.scores = lambda model, windows, vocab: 0.0 * windows[:, 1:]
F.cross_entropy = lambda logits, targets, **kwargs: 0.0 * logits.sum()
