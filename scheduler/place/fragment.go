package place

import (
	"cmp"
	"math"
	"slices"

	"github.com/rxvision/rxvision/cluster"
)

// Mix is the work that a cluster is expected to be asked for, by which free GPUs are
// worth something or nothing: the part of a node's free GPUs that work of the mix
// could not use there is its fragmentation, and work goes where that grows least
// (FGD: Weng et al., Beware of Fragmentation, USENIX ATC 2023). Two things go beyond FGD:
// of each kind of work only as much counts as has room at once, processor and memory
// included, and nodes that a kind of work can never use are used up first. It is immutable.
type Mix struct {
	shapes []shape
	total  int64
}

// shape is one kind of work with devices.
type shape struct {
	demand *demand
	key    string
	weight int64 // how often it is asked for
}

// mixCoverage is the share of the work, in thousandths, that the kinds in a Mix make
// up: the commonest ones.
const mixCoverage = 950

// Work counts the allocations of one group of a job.
type Work struct {
	Job    *cluster.Job
	Group  *cluster.TaskGroup
	Allocs int64
}

// NewMix makes a mix of the commonest kinds of work. Work without devices counts when it is said which ones
// are common, and has no part in it: all GPUs are equally useless to it.
func NewMix(work []Work) *Mix {
	byKey := map[string]int{}
	var all []shape
	m, total := &Mix{}, int64(0)
	for _, w := range work {
		d := newDemand(w.Job, w.Group)
		key := string(d.key(false))
		i, known := byKey[key]
		if !known {
			i = len(all)
			byKey[key] = i
			all = append(all, shape{demand: d, key: key})
		}
		all[i].weight += w.Allocs
		total += w.Allocs
	}
	slices.SortStableFunc(all, func(a, b shape) int { return cmp.Compare(b.weight, a.weight) })
	covered := int64(0)
	for _, s := range all {
		if covered*thousand >= total*mixCoverage {
			break
		}
		covered += s.weight
		if len(s.demand.devices) > 0 && s.weight > 0 {
			m.shapes = append(m.shapes, s)
			m.total += s.weight
		}
	}
	return m
}

// mixDrift is by how much of all work, in thousandths, two mixes may differ and count as alike.
const mixDrift = 100

// Like says whether the two differ so little that placement need not be judged anew.
func (m *Mix) Like(o *Mix) bool {
	if m == nil || o == nil {
		return m == o
	}
	shares := map[string]int64{}
	for _, s := range m.shapes {
		shares[s.key] += s.weight * thousand / m.total
	}
	for _, s := range o.shapes {
		shares[s.key] -= s.weight * thousand / o.total
	}
	drift := int64(0)
	for _, by := range shares {
		drift += max(by, -by)
	}
	return drift <= mixDrift
}

// reach says for each shape of a mix which groups of devices of a node it could use,
// as bits; 0: it could not run there even if the node were empty.
type reach struct {
	mix    *Mix
	node   *cluster.Node
	groups []uint64
}

// maxReach bounds the device groups of a node that count for fragmentation.
const maxReach = 64

// reached gives what the shapes of a mix reach on the host; patterns are the caller's, since a mix has many users.
func (h *host) reached(m *Mix, patterns patternCache) []uint64 {
	if h.reach.mix == m && h.reach.node == h.node {
		return h.reach.groups
	}
	groups := make([]uint64, len(m.shapes))
	for i, s := range m.shapes {
		d := *s.demand
		d.patterns = patterns
		if !inPool(nodePool(d.job.NodePool), h.node) || !inDatacenters(d.job.Datacenters, h.node.Datacenter) || d.filter(h.node) != "" {
			continue
		}
		for g, group := range h.node.NodeResources.Devices[:min(len(h.node.NodeResources.Devices), maxReach)] {
			if d.devices[0].suits(group, d.patterns) {
				groups[i] |= 1 << g
			}
		}
	}
	h.reach = reach{m, h.node, groups}
	return groups
}

// neverWeight is how much more a free GPU counts as lost to work that could not use it even on an empty node.
const neverWeight = 8

// fragmentation is what a typical allocation of the mix cannot use of a node's free GPUs, when so much is free of
// everything else and the shapes reach so many of its devices: thousandths of a GPU, times the mix's total, more where neverWeight counts. A GPU
// counts for one share; of a shape with several asks the first counts.
func (m *Mix) fragmentation(reached []uint64, cpu, memory int64, room []deviceRoom) int64 {
	idle := int64(0)
	for i := range room {
		idle += room[i].milli
	}
	if idle == 0 {
		return 0
	}
	sum := int64(0)
	for i, groups := range reached {
		s := &m.shapes[i]
		if groups == 0 {
			sum += neverWeight * s.weight * idle
			continue
		}
		ask := &s.demand.devices[0]
		fits, each := int64(0), int64(0)
		for k := range room {
			if r := &room[k]; groups>>r.group&1 == 1 && ask.fits(r) {
				fits, each = fits+1, ask.worth(r.memory)
			}
		}
		fits = min(fits/int64(ask.count), times(cpu, s.demand.cpu), times(memory, s.demand.memory))
		sum += s.weight * max(idle-fits*int64(ask.count)*each, 0)
	}
	return sum
}

// times is how often part fits into free; always, where it is nothing.
func times(free, part int64) int64 {
	if part <= 0 {
		return math.MaxInt64
	}
	return max(free, 0) / part
}

// growth is by how much the host's fragmentation grows with one more allocation of the
// demand, which fits: thousandths of a GPU, times the mix's total.
func (m *Mix) growth(h *host, d *demand) int64 {
	if len(h.node.NodeResources.Devices) == 0 || len(m.shapes) == 0 {
		return 0
	}
	d.room = h.room(d.room)
	if f := &h.fragments; f.mix != m || f.version != h.version {
		cpu, memory, _ := h.node.Available()
		*f = fragments{m, h.version, m.fragmentation(h.reached(m, d.patterns), cpu-h.use.CPU, memory-h.use.Memory, d.room)}
	}
	after := m.rate(h, d)
	takeDevices(h.node, d.room, d.devices, d.patterns, after, nil)
	return after(d.room) - h.fragments.sum
}

// fragments is a host's fragmentation as it was last added up.
type fragments struct {
	mix     *Mix
	version uint32 // the host's
	sum     int64
}

// mostGrowth is the growth, in thousandths of a GPU, that scores no better than 0: all of a large node.
const mostGrowth = 8 * cluster.WholeMilli

// score is growth in thousandths: 500 where work makes no difference, more where it takes
// what nobody else could use, less where it makes GPUs useless. It depends on nothing else, so that nodes of all sizes compare.
func (m *Mix) score(growth int64) int64 {
	if m.total == 0 {
		return thousand / 2
	}
	return min(max(thousand/2-growth*(thousand/2)/(mostGrowth*m.total), 0), thousand)
}

// rate gives the host's fragmentation with one more allocation of the demand, by what is then
// free of its devices: see takeDevices.
func (m *Mix) rate(h *host, d *demand) func([]deviceRoom) int64 {
	if m == nil || len(m.shapes) == 0 {
		return anyRoom
	}
	cpu, memory, _ := h.node.Available()
	cpu, memory = cpu-h.use.CPU-d.cpu, memory-h.use.Memory-d.memory
	reached := h.reached(m, d.patterns)
	return func(room []deviceRoom) int64 { return m.fragmentation(reached, cpu, memory, room) }
}

// anyRoom finds all devices alike.
func anyRoom([]deviceRoom) int64 { return 0 }
