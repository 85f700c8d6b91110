from dataclasses import dataclass
@dataclass(frozen=True)
class Bundle:
    cpus: float
    gpus: float
def workers_that_fit(worker, nodes, most):
    total=0
    for n in nodes:
        k=int(n["CPU"]//worker.cpus)
        total+=k
    return min(total,most)
