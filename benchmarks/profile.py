"""Writes a trace of a few training steps, and prints their ten costliest operations.

  python benchmarks/profile.py --config=configs/photos32.py --batch=8 --out=/tmp/trace
  python benchmarks/profile.py --config=configs/cifar10.py --batch=256 \
      --dtype=bfloat16 --steps=10 --out=/tmp/trace

The folder opens in XProf, TensorBoard's profiler or Perfetto. An operation is an
instruction of the compiled program; its time is its own, without that of instructions
inside it (a loop's body), summed over devices, threads and dispatches.
"""

import sys

if __name__ != "__main__":
    # Scripts in this folder have it first on their path, so this file hides the
    # standard library's `profile`, which cProfile imports (and debuggers, and some
    # libraries, import that). Whoever imports it gets what they mean.
    import importlib.util
    import sysconfig

    _spec = importlib.util.spec_from_file_location(
        "profile", f"{sysconfig.get_path('stdlib')}/profile.py"
    )
    sys.modules[__name__] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[__name__])
else:
    from absl import app
    from tracing import main

    app.run(main)
