//go:build cgo && linux

package gpu

import (
	"github.com/NVIDIA/go-nvml/pkg/nvml"
)

// How two GPUs reach each other, in the numbers of cluster.LinkSystem and those after it.
const (
	linkSystem = iota + 1
	linkNUMA
	linkHostBridge
	linkSwitches
	linkSwitch
	linkBoard
	linkNVLink // over one; each further one counts 1 more
)

var linkLevels = map[nvml.GpuTopologyLevel]int{
	nvml.TOPOLOGY_SYSTEM: linkSystem, nvml.TOPOLOGY_NODE: linkNUMA, nvml.TOPOLOGY_HOSTBRIDGE: linkHostBridge,
	nvml.TOPOLOGY_MULTIPLE: linkSwitches, nvml.TOPOLOGY_SINGLE: linkSwitch, nvml.TOPOLOGY_INTERNAL: linkBoard,
}

// link fills in how the GPUs reach each other. GPUs on an NVLink switch reach each other by as many links as the one with
// fewer has.
func (n *nvmlSource) link(devices []Device, handles []handle) {
	peers := make([]map[string]int, len(devices)) // NVLinks by the other end's bus ID, "" for switches
	for i := range devices {
		peers[i] = n.nvlinks(handles[i].dev)
	}
	for i := range devices {
		devices[i].Links = nil
		for j := range devices {
			if i == j {
				continue
			}
			ancestor := func() (nvml.GpuTopologyLevel, nvml.Return) {
				return handles[i].dev.GetTopologyCommonAncestor(handles[j].dev)
			}
			level := 0
			if at, ok := maybe(n, ancestor, "nvmlDeviceGetTopologyCommonAncestor"); ok {
				level = linkLevels[at]
			}
			if direct := peers[i][devices[j].PCIBusID]; direct > 0 && devices[j].PCIBusID != "" {
				level = linkNVLink + direct - 1
			} else if both := min(peers[i][""], peers[j][""]); both > 0 {
				level = linkNVLink + both - 1
			}
			if level > 0 {
				if devices[i].Links == nil {
					devices[i].Links = map[string]int{}
				}
				devices[i].Links[devices[j].UUID] = level
			}
		}
	}
}

// nvlinks counts the NVLinks of a GPU that are up, by what is at their other end.
func (n *nvmlSource) nvlinks(dev nvml.Device) map[string]int {
	ends := map[string]int{}
	for i := range nvml.NVLINK_MAX_LINKS {
		up := func() (nvml.EnableState, nvml.Return) { return dev.GetNvLinkState(i) }
		state, ok := maybe(n, up, "nvmlDeviceGetNvLinkState")
		if !ok {
			break // there is none, or no further one
		}
		if state != nvml.FEATURE_ENABLED {
			continue
		}
		kind := func() (nvml.IntNvLinkDeviceType, nvml.Return) { return dev.GetNvLinkRemoteDeviceType(i) }
		if k, ok := maybe(n, kind, "nvmlDeviceGetNvLinkRemoteDeviceType"); ok && k == nvml.NVLINK_DEVICE_TYPE_SWITCH {
			ends[""]++
			continue
		}
		remote := func() (nvml.PciInfo, nvml.Return) { return dev.GetNvLinkRemotePciInfo(i) }
		if p, ok := maybe(n, remote, "nvmlDeviceGetNvLinkRemotePciInfo_v2"); ok {
			if id := cString(p.BusId[:]); id != "" {
				ends[id]++
			}
		}
	}
	return ends
}
