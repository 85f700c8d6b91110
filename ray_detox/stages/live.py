import ray
def draining_nodes():
    return set(ray._private.state.state.get_draining_nodes())
def free_nodes(total=False):
    drain=draining_nodes()
    alive={n["NodeID"] for n in ray.nodes() if n["Alive"]}
    per=ray._private.state.total_resources_per_node() if total else ray._private.state.available_resources_per_node()
    return [{"CPU":r.get("CPU",0),"GPU":r.get("GPU",0)} for k,r in per.items() if k in alive-drain]
