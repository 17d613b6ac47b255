package cluster

import (
	"fmt"
	"maps"
	"slices"
)

// NodeUse adds up what allocations hold of a node. It is how both placement and
// the state judge whether work fits.
type NodeUse struct {
	node              *Node
	CPU, Memory, Disk int64
	Devices           map[string]DeviceUse // by ID, those of which anything is held
	ports             []int32              // held host ports, in order
	list              []holding            // that Follow has counted
	faults            []string
}

// DeviceUse adds up what tasks hold of one device.
type DeviceUse struct {
	Whole  int   // tasks that hold all of it
	Shares int   // tasks that hold a part
	Milli  int64 // thousandths of the device that the parts are
	MiB    int64 // of its memory
}

// Conflict says in what way more of a device is held than there is of any, "" when it is not.
func (d DeviceUse) Conflict() string {
	switch {
	case d.Whole > 1, d.Whole == 1 && d.Shares > 0:
		return "is held twice"
	case d.Milli > WholeMilli:
		return fmt.Sprintf("is held with %d of its %d thousandths", d.Milli, WholeMilli)
	}
	return ""
}

// conflicts lists what is held twice, whatever the node has.
func (u *NodeUse) conflicts() []string {
	out := slices.Clone(u.faults)
	for _, id := range sortedKeys(u.Devices) {
		if c := u.Devices[id].Conflict(); c != "" {
			out = append(out, "device "+id+" "+c)
		}
	}
	return out
}

// WholeMilli is a device in thousandths.
const WholeMilli = 1000

// holding is what one allocation holds. It keeps no more of the record alive.
type holding struct {
	id  string
	res *AllocatedResources
}

// NewNodeUse begins with nothing used.
func NewNodeUse(n *Node) *NodeUse { return &NodeUse{node: n, Devices: map[string]DeviceUse{}} }

// Clone gives a copy that changes by itself. It follows nothing.
func (u *NodeUse) Clone() *NodeUse {
	return &NodeUse{
		node: u.node, CPU: u.CPU, Memory: u.Memory, Disk: u.Disk,
		Devices: maps.Clone(u.Devices), ports: slices.Clone(u.ports), faults: slices.Clone(u.faults),
	}
}

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
	u.countDevices(h, 1)
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
	u.countDevices(h, -1)
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
	var cpu, memory Overlap
	for name, t := range h.res.Tasks {
		l := h.res.TaskLifecycles[name]
		cpu.Add(l, t.Cpu.CpuShares)
		memory.Add(l, t.Memory.MemoryMB)
	}
	u.CPU += by * cpu.Most()
	u.Memory += by * memory.Most()
	u.Disk += by * h.res.Shared.DiskMB
}

func (u *NodeUse) countDevices(h holding, by int) {
	if h.res == nil {
		return
	}
	for _, t := range h.res.Tasks {
		for _, d := range t.Devices {
			for _, id := range d.DeviceIDs {
				use := u.Devices[id]
				if d.Shared() {
					use.Shares += by
				} else {
					use.Whole += by
				}
				use.Milli += int64(by) * d.Milli
				use.MiB += int64(by) * d.MiB
				if use == (DeviceUse{}) {
					delete(u.Devices, id)
				} else {
					u.Devices[id] = use
				}
			}
		}
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

// Fault says what is over-committed, "" when all fits: cpu, memory, disk, a port that two
// allocations hold, or a device of which more is held than there is.
func (u *NodeUse) Fault() string {
	if len(u.faults) > 0 {
		return u.faults[0]
	}
	cpu, ram, disk := u.node.Available()
	switch {
	case u.CPU > cpu:
		return "cpu"
	case u.Memory > ram:
		return "memory"
	case u.Disk > disk:
		return "disk"
	}
	return u.DeviceFault()
}

// DeviceFault says of which device more is held than there is, "" for none.
func (u *NodeUse) DeviceFault() string {
	if len(u.Devices) == 0 {
		return ""
	}
	memory := map[string]int64{}
	for _, g := range u.node.NodeResources.Devices {
		for _, d := range g.Instances {
			memory[d.ID] = g.MemoryMiB()
		}
	}
	for _, id := range sortedKeys(u.Devices) {
		mib, has := memory[id]
		switch use := u.Devices[id]; {
		case !has:
			return "device " + id + " is not on the node"
		case use.Conflict() != "":
			return "device " + id + " " + use.Conflict()
		case use.MiB > mib:
			return fmt.Sprintf("device %s: %d MiB of its %d are held", id, use.MiB, mib)
		}
	}
	return ""
}
