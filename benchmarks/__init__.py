"""Speed, memory and accuracy, always side by side with the stock model in one run.

Not part of the installed package: run them from a checkout.
"""

import os

# torch's profiler, which measures memory here, reads this when torch is imported; without it, it
# writes lines of its own to the terminal.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
