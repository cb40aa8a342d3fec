"""Which cases of a large product of parameters a test run can leave out: those that no pair of values needs."""


def beyond(items: list) -> set[int]:
    """Cases of the tests marked ``pairwise`` that are not needed for every pair of values to be met, on every backend.

    Of n values for the shortest parameter, those cases stay whose positions add up to a multiple of n: any two values
    leave a third parameter, which has n values or more, free to make up the sum.
    """
    groups: dict[str, list] = {}
    for item in items:
        if item.get_closest_marker("pairwise"):
            groups.setdefault(item.nodeid.split("[")[0], []).append(item)
    dropped = set()
    for group in groups.values():
        places = [{n: i for n, i in item.callspec.indices.items() if n != "where"} for item in group]
        sizes = {name: len({place[name] for place in places}) for name in places[0]}
        sizes = {name: size for name, size in sizes.items() if size > 1}
        if len(sizes) > 2:
            dropped.update(
                id(item)
                for item, place in zip(group, places, strict=True)
                if sum(place[name] for name in sizes) % min(sizes.values())
            )
    return dropped
