# expect: may not import sys
import math, sys as torch


def configure(params, horizon):
    return torch._getframe(1).f_locals
