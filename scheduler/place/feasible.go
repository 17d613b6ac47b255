package place

import (
	"fmt"
	"hash/fnv"
	"slices"
	"strconv"
	"strings"

	"github.com/rxvision/rxvision/cluster"
)

// Dynamic ports come from this range on nodes that name none, as in Nomad.
const (
	defaultMinDynamicPort = 20000
	defaultMaxDynamicPort = 32000
)

// demand is what one allocation of a group asks of a node.
type demand struct {
	job               *cluster.Job
	group             *cluster.TaskGroup
	cpu, memory, disk int64
	drivers           []string
	constraints       []*cluster.Constraint
	distinctHosts     bool // no other allocation of the job on the node
	distinctInGroup   bool // none of the group
	distinct          []distinct
	spot              string // whether it may, or must, go to spot nodes
	affinities        []*cluster.Affinity
	devices           []deviceAsk
	networks          []*cluster.NetworkResource
	patterns          patternCache
	oversubscribe     bool         // memory_max is honoured
	room              []deviceRoom // memory for the next look at a host
	judge             judge        // … and to rate it
}

func newDemand(job *cluster.Job, g *cluster.TaskGroup) *demand {
	d := &demand{job: job, group: g, networks: g.Networks, patterns: patternCache{}, spot: job.Spot(g)}
	if g.EphemeralDisk != nil {
		d.disk = int64(g.EphemeralDisk.SizeMB)
	}
	d.distinctHosts = d.constrain(job.Constraints, "")
	d.distinctInGroup = d.constrain(g.Constraints, g.Name)
	d.affinities = slices.Concat(job.Affinities, g.Affinities)
	var cpu, memory cluster.Overlap
	for _, t := range g.Tasks {
		d.constrain(t.Constraints, g.Name)
		d.affinities = append(d.affinities, t.Affinities...)
		if !slices.Contains(d.drivers, t.Driver) {
			d.drivers = append(d.drivers, t.Driver)
		}
		if t.Resources == nil {
			continue
		}
		cpu.Add(t.Lifecycle, int64(t.Resources.CPU))
		memory.Add(t.Lifecycle, int64(t.Resources.MemoryMB))
		d.devices = append(d.devices, deviceAsks(t)...)
	}
	d.cpu, d.memory = cpu.Most(), memory.Most()
	specificFirst(d.devices)
	return d
}

// constrain takes over constraints and says whether distinct_hosts is among them.
// group is the one that they belong to, "" for all.
func (d *demand) constrain(cs []*cluster.Constraint, group string) (distinctHosts bool) {
	for _, c := range cs {
		switch c.Operand {
		case operandDistinctHosts:
			distinctHosts = distinctHosts || c.RTarget != "false"
		case operandDistinctProperty:
			d.distinct = append(d.distinct, newDistinct(c, group))
		default:
			d.constraints = append(d.constraints, c)
		}
	}
	return distinctHosts
}

// nodePool names the default pool where a job or node names none.
func nodePool(name string) string {
	if name == "" {
		return cluster.DefaultNodePool
	}
	return name
}

// Why a node is no place for the group, where upstream has no word for it.
const (
	filterSpot   = "spot node: meta rx_spot does not allow it"
	filterNoSpot = "no spot node, which meta rx_spot requires"
)

// filter says in upstream's words why the group can never run on the node as it
// is, "" when it can. It does not look at what is in use.
func (d *demand) filter(n *cluster.Node) string {
	for _, driver := range d.drivers {
		if i := n.Drivers[driver]; i == nil || !i.Detected || !i.Healthy {
			return "missing drivers"
		}
	}
	switch spot := n.Attributes[cluster.AttrSpot] == "true"; {
	case spot && d.spot == cluster.SpotNever:
		return filterSpot
	case !spot && d.spot == cluster.SpotRequire:
		return filterNoSpot
	}
	at := nodeLookup(n)
	for _, c := range d.constraints {
		left, leftFound := at(c.LTarget)
		right, rightFound := at(c.RTarget)
		if !holds(c.Operand, left, right, leftFound, rightFound, d.patterns) {
			return c.String()
		}
	}
	for _, x := range d.distinct {
		if _, found := at(x.target); !found {
			return fmt.Sprintf("missing property %q", x.target)
		}
	}
	for i := range d.devices {
		if !slices.ContainsFunc(n.NodeResources.Devices, func(g *cluster.NodeDeviceResource) bool {
			return d.devices[i].suits(g, d.patterns)
		}) {
			return "missing devices"
		}
	}
	return ""
}

// exhausted says in upstream's words which dimension of the node is too full for
// the group, "" when it fits.
func (d *demand) exhausted(h *host) string {
	cpu, memory, disk := h.node.Available()
	switch {
	case h.use.CPU+d.cpu > cpu:
		return "cpu"
	case h.use.Memory+d.memory > memory:
		return "memory"
	case h.use.Disk+d.disk > disk:
		return "disk"
	}
	if len(d.networks) > 0 {
		if _, fault := h.takePorts(d.networks, ""); fault != "" {
			return fault
		}
	}
	if len(d.devices) > 0 {
		d.room = append(d.room[:0], h.room()...)
		d.judge.mix = nil
		return takeDevices(h.node, d.room, d.devices, d.patterns, &d.judge, nil)
	}
	return ""
}

// take gives an allocation its resources on a node where exhausted found none missing;
// of several devices that would do, the one that suits the mix best.
func (d *demand) take(h *host, allocID string, mix *Mix) (*cluster.AllocatedResources, error) {
	networks, fault := h.takePorts(d.networks, allocID)
	if fault != "" {
		return nil, fmt.Errorf("node %s: %s", h.node.ID, fault)
	}
	devices := map[string][]*cluster.AllocatedDevice{}
	d.judge.on(mix, h, d, d.patterns)
	fault = takeDevices(h.node, slices.Clone(h.room()), d.devices, d.patterns, &d.judge, func(ask *deviceAsk, g *cluster.NodeDeviceResource, ids []string) {
		got := &cluster.AllocatedDevice{Vendor: g.Vendor, Type: g.Type, Name: g.Name, DeviceIDs: ids, MemoryMiB: g.MemoryMiB()}
		if ask.shared() {
			got.Milli, got.MiB = ask.share(g.MemoryMiB())
		}
		devices[ask.task] = append(devices[ask.task], got)
	})
	if fault != "" {
		return nil, fmt.Errorf("node %s: %s", h.node.ID, fault)
	}
	r := &cluster.AllocatedResources{Tasks: map[string]*cluster.AllocatedTaskResources{}}
	for _, t := range d.group.Tasks {
		tr := &cluster.AllocatedTaskResources{Devices: devices[t.Name]}
		if t.Resources != nil {
			tr.Cpu.CpuShares = int64(t.Resources.CPU)
			tr.Memory.MemoryMB = int64(t.Resources.MemoryMB)
			if d.oversubscribe {
				tr.Memory.MemoryMaxMB = int64(t.Resources.MemoryMaxMB)
			}
		}
		r.Tasks[t.Name] = tr
		if t.Lifecycle != nil {
			if r.TaskLifecycles == nil {
				r.TaskLifecycles = map[string]*cluster.TaskLifecycle{}
			}
			r.TaskLifecycles[t.Name] = t.Lifecycle
		}
	}
	r.Shared.DiskMB = d.disk
	r.Shared.Networks = networks
	for _, n := range networks {
		for _, ports := range [][]cluster.Port{n.ReservedPorts, n.DynamicPorts} {
			for _, p := range ports {
				r.Shared.Ports = append(r.Shared.Ports, cluster.PortMapping{Label: p.Label, Value: p.Value, To: p.To, HostIP: n.IP})
			}
		}
	}
	return r, nil
}

// takePorts assigns host ports for a group's networks: the static ones as named,
// the dynamic ones from the node's range, beginning at a place that depends on
// the allocation, so that plans made side by side seldom meet.
func (h *host) takePorts(asks []*cluster.NetworkResource, allocID string) ([]*cluster.NetworkResource, string) {
	mine := map[int]bool{}
	free := func(port int) bool {
		return !h.use.Port(port) && !mine[port] && !h.reservedPorts().has(port)
	}
	var ip, device string
	if ns := h.node.NodeResources.Networks; len(ns) > 0 {
		ip, device = ns[0].IP, ns[0].Device
	}
	out := make([]*cluster.NetworkResource, len(asks))
	for i, ask := range asks { // static ports first: no dynamic one may take theirs
		n := *ask
		n.IP, n.Device = ip, device
		n.ReservedPorts = slices.Clone(ask.ReservedPorts)
		n.DynamicPorts = slices.Clone(ask.DynamicPorts)
		for j, p := range n.ReservedPorts {
			if !free(p.Value) {
				return nil, fmt.Sprintf("network: reserved port collision %s=%d", p.Label, p.Value)
			}
			mine[p.Value] = true
			n.ReservedPorts[j].To = portInside(p.To, p.Value)
		}
		out[i] = &n
	}
	low, high := h.node.NodeResources.MinDynamicPort, h.node.NodeResources.MaxDynamicPort
	if low <= 0 || high < low {
		low, high = defaultMinDynamicPort, defaultMaxDynamicPort
	}
	for _, n := range out {
		for j, p := range n.DynamicPorts {
			port := firstFree(low, high, hash(allocID, p.Label), free)
			if port == 0 {
				return nil, "network: dynamic port selection failed"
			}
			mine[port] = true
			n.DynamicPorts[j].Value, n.DynamicPorts[j].To = port, portInside(p.To, port)
		}
	}
	return out, ""
}

// portInside is the port that the task listens on: -1 asks for the host port.
func portInside(to, value int) int {
	if to == -1 {
		return value
	}
	return to
}

// firstFree probes the whole range once from a start that seed chooses; 0 when
// nothing is free.
func firstFree(low, high int, seed uint64, free func(int) bool) int {
	size := high - low + 1
	start := int(seed % uint64(size))
	for i := range size {
		if port := low + (start+i)%size; free(port) {
			return port
		}
	}
	return 0
}

func hash(parts ...string) uint64 {
	f := fnv.New64a()
	for _, p := range parts {
		f.Write([]byte(p))
		f.Write([]byte{0})
	}
	return f.Sum64()
}

// portRanges are a node's own ports: "22,80,8000-8100".
type portRanges [][2]int

func parsePortRanges(s string) portRanges {
	var out portRanges
	for _, part := range strings.Split(s, ",") {
		from, to, ranged := strings.Cut(strings.TrimSpace(part), "-")
		low, err := strconv.Atoi(strings.TrimSpace(from))
		if err != nil {
			continue
		}
		high := low
		if ranged {
			if high, err = strconv.Atoi(strings.TrimSpace(to)); err != nil {
				continue
			}
		}
		out = append(out, [2]int{low, high})
	}
	return out
}

func (r portRanges) has(port int) bool {
	for _, x := range r {
		if port >= x[0] && port <= x[1] {
			return true
		}
	}
	return false
}
