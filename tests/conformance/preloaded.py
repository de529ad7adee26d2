"""What each process of a distributed test begins with."""

import modeling_bmojo  # noqa: F401
from tests.conformance.upstream import mount


common = mount()
