package place

import (
	"cmp"
	"math/bits"
	"slices"

	"github.com/rxvision/rxvision/cluster"
)

// Mix is the work that a cluster is expected to be asked for, by which free GPUs are
// worth something or nothing: the part of a node's free GPUs that work of the mix
// could not use there is its fragmentation, and work goes where that grows least
// (FGD: Weng et al., Beware of Fragmentation, USENIX ATC 2023). Two things go beyond FGD: GPUs
// count as usable only as far as processor and memory reach, and GPUs that are scarce for who can use no
// others are dearer. It is immutable.
type Mix struct {
	shapes []shape
	sizes  []deviceAsk // what one device is asked for: that of many shapes is the same
	total  int64
}

// shape is one kind of work with devices. Of several asks the first counts.
type shape struct {
	demand      *demand
	ask         *deviceAsk
	count       int64 // of the ask
	size        int   // of Mix.sizes
	cpu, memory float64
	key         string
	weight      int64 // how often it is asked for
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
func NewMix(work []Work) *Mix { return new(Tally).Mix(work) }

// Tally makes one mix after another of work that is mostly the same, and looks at each group once. What a group asks for must not
// change while its address is the same, as in records of the state. The zero value is ready; it belongs to one goroutine.
type Tally struct {
	groups map[*cluster.TaskGroup]*shape // of the last mix
}

// Mix is NewMix.
func (t *Tally) Mix(work []Work) *Mix {
	byKey := map[string]*shape{}
	groups := make(map[*cluster.TaskGroup]*shape, len(work))
	at := map[*shape]int{}
	var all []shape
	m, total := &Mix{}, int64(0)
	for _, w := range work {
		s := t.groups[w.Group]
		if s == nil {
			d := newDemand(w.Job, w.Group)
			key := string(d.key(false))
			if s = byKey[key]; s == nil {
				s = &shape{demand: d, key: key, cpu: float64(max(d.cpu, 1)), memory: float64(max(d.memory, 1))}
			}
		}
		i, known := at[s]
		if !known {
			if same := byKey[s.key]; same != nil {
				s, i = same, at[same]
			} else {
				byKey[s.key], i = s, len(all)
				at[s] = i
				all = append(all, *s)
			}
		}
		groups[w.Group] = s
		all[i].weight += w.Allocs
		total += w.Allocs
	}
	t.groups = groups
	slices.SortStableFunc(all, func(a, b shape) int { return cmp.Compare(b.weight, a.weight) })
	covered := int64(0)
	for _, s := range all {
		if covered*thousand >= total*mixCoverage {
			break
		}
		covered += s.weight
		if len(s.demand.devices) > 0 && s.weight > 0 {
			s.ask = &s.demand.devices[0]
			s.count, s.size = int64(s.ask.count), m.size(s.ask)
			m.shapes = append(m.shapes, s)
			m.total += s.weight
		}
	}
	return m
}

// size finds what an ask takes of one device among the sizes, or adds it.
func (m *Mix) size(a *deviceAsk) int {
	i := slices.IndexFunc(m.sizes, func(o deviceAsk) bool { return o.milli == a.milli && o.mib == a.mib })
	if i < 0 {
		i = len(m.sizes)
		m.sizes = append(m.sizes, deviceAsk{milli: a.milli, mib: a.mib})
	}
	return i
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
	cpu, memory, _ := h.node.Available()
	for i := range m.shapes {
		d := *m.shapes[i].demand
		d.patterns = patterns
		if d.cpu > cpu || d.memory > memory || !h.node.InPool(d.job.NodePool) || !cluster.InDatacenters(d.job.Datacenters, h.node.Datacenter) || d.filter(h.node) != "" {
			continue
		}
		for g, group := range h.node.NodeResources.Devices[:min(len(h.node.NodeResources.Devices), maxReach)] {
			if m.shapes[i].ask.suits(group, patterns) {
				groups[i] |= 1 << g
			}
		}
	}
	h.reach = reach{m, h.node, groups}
	return groups
}

// priceShare is the part of a GPU's price that counts beside fragmentation: a quarter. More of it keeps
// GPUs for work that names them while others break up nodes elsewhere.
const priceShare = 0.25

// price tells of each host's groups of devices what a thousandth of a GPU costs: how much work of the mix
// asks for each GPU that it could use, summed over the work that could use this one. Where all work can use all
// GPUs, all cost the same; GPUs that some work depends on are left to it as long as others are free.
func (c *Cache) price() {
	m := c.mix
	if c.priced || m == nil {
		return
	}
	c.priced = true
	patterns := patternCache{}
	supply, asked := make([]int64, len(m.shapes)), make([]int64, len(m.shapes))
	all, total := int64(0), int64(0)
	healthy := func(g *cluster.NodeDeviceResource) (n int64) {
		for _, d := range g.Instances {
			if d.Healthy {
				n++
			}
		}
		return n
	}
	hosts := make([]*host, 0, len(c.hosts))
	for _, h := range c.hosts {
		h.prices = nil
		if !h.node.Ready() || h.node.NodeResources == nil || len(h.node.NodeResources.Devices) == 0 {
			continue
		}
		hosts = append(hosts, h)
		reached := h.reached(m, patterns)
		for g, group := range h.node.NodeResources.Devices[:min(len(h.node.NodeResources.Devices), maxReach)] {
			n := healthy(group)
			all += n
			for i, groups := range reached {
				if groups>>g&1 == 1 {
					if supply[i] == 0 {
						s := &m.shapes[i]
						asked[i] = s.weight * s.count * s.ask.worth(group.MemoryMiB())
						total += asked[i]
					}
					supply[i] += n
				}
			}
		}
	}
	if total == 0 {
		return
	}
	each := make([]int64, len(m.shapes)) // what a shape adds to the price of each GPU that it could use
	for i := range each {
		if supply[i] > 0 {
			each[i] = int64(priceShare * float64(m.total) * float64(asked[i]) / float64(total) * float64(all) / float64(supply[i]))
		}
	}
	for _, h := range hosts {
		h.prices = make([]int64, min(len(h.node.NodeResources.Devices), maxReach))
		for i, groups := range h.reach.groups {
			for ; groups != 0; groups &= groups - 1 {
				h.prices[bits.TrailingZeros64(groups)] += each[i]
			}
		}
	}
}

// usableTimes is how often as much as processor and memory suffice for counts as usable of a node's free GPUs:
// other work may ask for less of them. With 1 a node short of processors would count as worthless
// too early; without bound (as in FGD) too late.
const usableTimes = 2

// judge rates what is left of a host's devices, with so much left of everything else. The zero value finds all alike.
type judge struct {
	mix         *Mix
	reached     []uint64
	prices      []int64
	cpu, memory int64
	last        int64 // the cost that was found last, if
	known       bool  // nothing was taken since

	// memory for the next look
	costs  []int64
	usable []usable
	tried  []deviceRoom
}

// usable is what devices of one group have room for one size, or by how much that changes.
type usable struct{ fits, milli, worth int64 }

// on prepares to judge the host as it would be with the demand placed there, or as it is (nil).
func (j *judge) on(m *Mix, h *host, d *demand, patterns patternCache) {
	if j.mix, j.known = m, false; m == nil || len(m.shapes) == 0 {
		j.mix = nil
		return
	}
	cpu, memory, _ := h.node.Available()
	j.reached, j.prices, j.cpu, j.memory = h.reached(m, patterns), h.prices, cpu-h.use.CPU, memory-h.use.Memory
	if d != nil {
		j.cpu, j.memory = j.cpu-d.cpu, j.memory-d.memory
	}
}

// cost is what a typical allocation of the mix could not use of the devices, and the price of all that is left, which
// counts for the host: thousandths of a GPU, times the mix's total.
func (j *judge) cost(room []deviceRoom) int64 { return j.each(room, nil, nil)[0] }

// each is the cost for each of the devices tried, indexes of room, if the share were taken of it; without any, the cost as it is.
func (j *judge) each(room []deviceRoom, share *deviceAsk, tried []int) []int64 {
	n := max(len(tried), 1)
	j.costs = append(j.costs[:0], make([]int64, n)...)
	costs := j.costs
	if j.mix == nil {
		return costs
	}
	idle, groups := int64(0), 0
	for k := range room {
		r := &room[k]
		idle, groups = idle+r.milli, max(groups, int(r.group)+1)
		costs[0] -= r.milli * j.priceOf(r)
	}
	j.tried = j.tried[:0]
	for i, k := range tried {
		r := room[k]
		r.take(share)
		j.tried = append(j.tried, r)
		if i > 0 {
			costs[i] = costs[0]
		}
	}
	for i, k := range tried {
		costs[i] += (room[k].milli - j.tried[i].milli) * j.priceOf(&room[k])
	}
	j.count(room, groups, tried)
	per := groups * (1 + len(tried)) // the devices as they are, then by how much each that is tried changes that
	for i, reached := range j.reached {
		s := &j.mix.shapes[i]
		times := int64(0)
		if reached != 0 {
			times = int64(min(float64(max(j.cpu, 0))/s.cpu, float64(max(j.memory, 0))/s.memory))
		}
		if times == 0 {
			for i := range costs {
				left := idle
				if len(tried) > 0 {
					left += j.tried[i].milli - room[tried[i]].milli
				}
				costs[i] += s.weight * left
			}
			continue
		}
		was := j.sum(j.usable[s.size*per:][:groups], reached)
		most := usableTimes * s.count * times
		for i := range costs {
			is, left := was, idle
			if len(tried) > 0 {
				by := j.sum(j.usable[s.size*per+groups*(1+i):][:groups], reached)
				is.fits, is.milli = is.fits+by.fits, is.milli+by.milli
				left += j.tried[i].milli - room[tried[i]].milli
			}
			if is.fits >= s.count {
				left -= min(is.milli, most*is.worth)
			}
			costs[i] += s.weight * left
		}
	}
	return costs
}

func (j *judge) priceOf(r *deviceRoom) int64 {
	if int(r.group) < len(j.prices) {
		return j.prices[r.group]
	}
	return 0
}

// count fills usable: for each size, by group, what the devices have room for; then, for each of those tried, by
// how much that changes.
func (j *judge) count(room []deviceRoom, groups int, tried []int) {
	j.usable = append(j.usable[:0], make([]usable, len(j.mix.sizes)*groups*(1+len(tried)))...)
	at := 0
	for i := range j.mix.sizes {
		a := &j.mix.sizes[i]
		for k := range room {
			if r := &room[k]; a.fits(r) {
				u := &j.usable[at+int(r.group)]
				u.fits, u.milli, u.worth = u.fits+1, u.milli+r.milli, a.worth(r.memory)
			}
		}
		at += groups
		for t, k := range tried {
			was, is := &room[k], &j.tried[t]
			u := &j.usable[at+int(was.group)]
			if a.fits(was) {
				u.fits, u.milli = u.fits-1, u.milli-was.milli
			}
			if a.fits(is) {
				u.fits, u.milli = u.fits+1, u.milli+is.milli
			}
			at += groups
		}
	}
}

// sum adds up the groups that are reached.
func (j *judge) sum(by []usable, reached uint64) usable {
	if len(by) == 1 {
		return by[0] // as most nodes have it; what reaches any reaches this
	}
	var all usable
	for g, u := range by {
		if reached>>g&1 == 1 {
			all = usable{all.fits + u.fits, all.milli + u.milli, max(all.worth, u.worth)}
		}
	}
	return all
}

// growth is by how much the host's cost grows with one more allocation of the
// demand, which fits: thousandths of a GPU, times the mix's total.
func (m *Mix) growth(h *host, d *demand) int64 {
	if len(h.node.NodeResources.Devices) == 0 || len(m.shapes) == 0 {
		return 0
	}
	if f := &h.fragments; f.mix != m || f.version != h.version {
		d.judge.on(m, h, nil, d.patterns)
		*f = fragments{m, h.version, d.judge.cost(h.room())}
	}
	d.judge.on(m, h, d, d.patterns)
	d.room = append(d.room[:0], h.room()...)
	takeDevices(h.node, d.room, d.devices, d.patterns, &d.judge, nil)
	if !d.judge.known {
		d.judge.last = d.judge.cost(d.room)
	}
	return d.judge.last - h.fragments.sum
}

// fragments is a host's cost as it was last added up.
type fragments struct {
	mix     *Mix
	version uint32 // the host's
	sum     int64
}

// growthStep is by how much growth must differ, in thousandths of a GPU, to score differently.
const growthStep = 32

// score is growth in thousandths: 500 where work makes no difference, more where it takes
// what nobody else could use, less where it makes GPUs useless. It depends on nothing else, so that nodes of all sizes
// compare; 16 GPUs make all the difference there is.
func (m *Mix) score(growth int64) int64 {
	if m.total == 0 {
		return thousand / 2
	}
	step := m.total * growthStep
	level := growth / step
	if growth%step < 0 {
		level--
	}
	return min(max(thousand/2-level, 0), thousand)
}
