"""A package, so that `import data` finds this folder and not another one of that name."""
