package place

import (
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// foundWithin bounds how long after a failure the device that the allocation held may be
// found unhealthy for the failure to be put down to the device.
const foundWithin = time.Minute

// onUnfit says whether an allocation must leave a device that it holds: that is unhealthy,
// gone, or to be emptied. Shares and MIG slices are devices too.
func (p *planner) onUnfit(a *cluster.Allocation) bool {
	h := p.byID[a.NodeID]
	if h == nil {
		return false
	}
	id, _ := h.node.UnfitDevice(a)
	return id != ""
}

// brokenUnder says whether an allocation has failed because a device broke under it. Then
// it is replaced at once, and that counts for nothing in its reschedule policy.
func (p *planner) brokenUnder(a *cluster.Allocation) (broken bool) {
	h := p.byID[a.NodeID]
	if h == nil {
		return false
	}
	a.AllocatedResources.Devices(func(id string) bool {
		if d := h.node.Device(id); d != nil && !d.Healthy && h.node.Unfit(id) != "" {
			broken = broken || failedAt(a).Add(foundWithin) >= d.UnhealthySince
		}
		return !broken
	})
	return broken
}
