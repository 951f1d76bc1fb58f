"""Token files of other projects, for `megamix blend adopt`: used where they lie, or converted in one pass."""
