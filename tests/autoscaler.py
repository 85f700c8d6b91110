"""Decisions of Ray's autoscaler, computed without a cluster."""

from collections.abc import Mapping, Sequence
from typing import Any


def nodes_asked_for(
    settings: Mapping[str, Any], demands: Sequence[tuple[int, Mapping[str, float]]]
) -> dict[str, int]:
    """Return the nodes by type that the autoscaler adds for pending `(count, resources)`.

    Args:
        settings: of the autoscaler, as the launcher or KubeRay gives them.
        demands: of tasks and actors.
    """
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    config = AutoscalingConfig(settings, skip_content_hash=True)
    requests = [ResourceRequestUtil.make(each) for count, each in demands for _ in range(count)]
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count(requests),
        )
    )
    return {launch.instance_type: launch.count for launch in reply.to_launch}
