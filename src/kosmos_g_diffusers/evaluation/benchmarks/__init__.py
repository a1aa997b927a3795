"""The benchmarks of `kosmos-g evaluate`. A benchmark is a module: name it here. It has

TITLE, DESCRIPTION, EXAMPLES    for the help
SETTINGS, BATCH_SIZE            of a run, unless the user says otherwise
SCORERS                         names of --scorer, likewise; None if it takes none
LAYOUTS                         of the images of other models that --generated reads (generated.py); () if it reads none
add_arguments(parser)           the flags that others do not have
plan(arguments)                 what is run, a `Manifest`
"""

from types import ModuleType

from . import coco, dreambench, dreambench_plus, multi, multibanana, omnicontext, sprites

BENCHMARKS: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2].replace("_", "-"): module
    for module in (dreambench, coco, multi, dreambench_plus, omnicontext, multibanana, sprites)
}
