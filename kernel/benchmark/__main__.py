"""`python -m mustafar.kernel.benchmark`"""

import sys

from .cli import main

sys.exit(main())
