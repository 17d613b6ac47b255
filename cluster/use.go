package cluster

import (
	"fmt"
	"slices"
)

// NodeUse adds up what allocations hold of a node. It is how both placement and
// the state judge whether work fits.
type NodeUse struct {
	node              *Node
	CPU, Memory, Disk int64
	Devices           map[string]string // device ID → allocation ID
	ports             []int32           // held host ports, in order
	list              []holding         // that Follow has counted
	faults            []string
}

// holding is what one allocation holds. It keeps no more of the record alive.
type holding struct {
	id  string
	res *AllocatedResources
}

// NewNodeUse begins with nothing used.
func NewNodeUse(n *Node) *NodeUse { return &NodeUse{node: n, Devices: map[string]string{}} }

// Follow counts the given allocations, by ID, in place of those that it was given
// before, by looking at the differences. What was added besides stays counted,
// unless it says that it began anew: that is after a fault.
func (u *NodeUse) Follow(n *Node, list []*Allocation) (anew bool) {
	u.node = n
	if len(u.faults) > 0 {
		*u = *NewNodeUse(n)
		anew = true
	}
	var added []holding // after all others have left
	i := 0
	for j := 0; j < len(list); {
		h := holding{list[j].ID, list[j].AllocatedResources}
		switch {
		case i < len(u.list) && u.list[i] == h: // as nearly all are
			i, j = i+1, j+1
		case i < len(u.list) && u.list[i].id <= h.id:
			u.remove(u.list[i])
			u.list = slices.Delete(u.list, i, i+1)
		default:
			added = append(added, h)
			u.list = slices.Insert(u.list, i, h)
			i, j = i+1, j+1
		}
	}
	for _, h := range u.list[i:] {
		u.remove(h)
	}
	clear(u.list[i:])
	u.list = u.list[:i]
	for _, h := range added {
		u.add(h)
	}
	return anew
}

// Add counts an allocation's resources.
func (u *NodeUse) Add(a *Allocation) { u.add(holding{a.ID, a.AllocatedResources}) }

// Remove takes back an allocation that was added.
func (u *NodeUse) Remove(a *Allocation) { u.remove(holding{a.ID, a.AllocatedResources}) }

func (u *NodeUse) add(h holding) {
	u.count(h, 1)
	h.devices(func(id string) {
		if holder, taken := u.Devices[id]; taken {
			u.faults = append(u.faults, fmt.Sprintf("device %s is held by allocation %s", id, holder))
		}
		u.Devices[id] = h.id
	})
	h.ports(func(port int32) {
		i, taken := slices.BinarySearch(u.ports, port)
		if taken {
			u.faults = append(u.faults, fmt.Sprintf("port %d of allocation %s is held by another", port, h.id))
			return
		}
		u.ports = slices.Insert(u.ports, i, port)
	})
}

func (u *NodeUse) remove(h holding) {
	u.count(h, -1)
	h.devices(func(id string) { delete(u.Devices, id) })
	h.ports(func(port int32) {
		if i, taken := slices.BinarySearch(u.ports, port); taken {
			u.ports = slices.Delete(u.ports, i, i+1)
		}
	})
}

// Port says whether a host port is held.
func (u *NodeUse) Port(port int) bool {
	_, held := slices.BinarySearch(u.ports, int32(port))
	return held
}

func (u *NodeUse) count(h holding, by int64) {
	if h.res == nil {
		return
	}
	for _, t := range h.res.Tasks {
		u.CPU += by * t.Cpu.CpuShares
		u.Memory += by * t.Memory.MemoryMB
	}
	u.Disk += by * h.res.Shared.DiskMB
}

// devices calls fn for each device, in an order that is always the same.
func (h holding) devices(fn func(id string)) {
	if h.res == nil {
		return
	}
	var ids []string
	for _, t := range h.res.Tasks {
		for _, d := range t.Devices {
			ids = append(ids, d.DeviceIDs...)
		}
	}
	slices.Sort(ids)
	for _, id := range ids {
		fn(id)
	}
}

func (h holding) ports(fn func(port int32)) {
	if h.res == nil {
		return
	}
	for _, p := range h.res.Shared.Ports {
		fn(int32(p.Value))
	}
}

// Available is what the node offers to work: its resources less the reserved.
func (n *Node) Available() (cpu, memory, disk int64) {
	r, kept := n.NodeResources, n.ReservedResources
	if r == nil {
		return 0, 0, 0
	}
	cpu, memory, disk = r.Cpu.CpuShares, r.Memory.MemoryMB, r.Disk.DiskMB
	if kept != nil {
		cpu, memory, disk = cpu-kept.Cpu.CpuShares, memory-kept.Memory.MemoryMB, disk-kept.Disk.DiskMB
	}
	return cpu, memory, disk
}

// Fault says what is over-committed, "" when all fits: cpu, memory, disk, or a
// device or port that two allocations hold or that the node does not have.
func (u *NodeUse) Fault() string {
	if len(u.faults) > 0 {
		return u.faults[0]
	}
	cpu, memory, disk := u.node.Available()
	switch {
	case u.CPU > cpu:
		return "cpu"
	case u.Memory > memory:
		return "memory"
	case u.Disk > disk:
		return "disk"
	}
	if len(u.Devices) == 0 {
		return ""
	}
	has := map[string]bool{}
	for _, g := range u.node.NodeResources.Devices {
		for _, d := range g.Instances {
			has[d.ID] = true
		}
	}
	for _, id := range sortedKeys(u.Devices) {
		if !has[id] {
			return "device " + id + " is not on the node"
		}
	}
	return ""
}
