package place

import (
	"maps"
	"slices"

	"github.com/rxvision/rxvision/cluster"
)

// Scores are in thousandths: 1000 is best, negative ones push away. A node's
// score is the mean of those that apply to it; their names are upstream's. Those of
// affinities and spreads apply to all nodes if the group has any, so that who meets
// one is never worse off for it.
const (
	scoreBinpack  = "binpack"
	scoreSpread   = "spread"
	scoreAnti     = "job-anti-affinity"
	scoreAvoid    = "node-reschedule-penalty"
	scoreAffinity = "node-affinity"
	scoreDevices  = "devices"
	scoreSpreads  = "allocation-spread"
	scoreSpareGPU = "device-protection" // ours: work without devices leaves device nodes alone
	scoreFragment = "gpu-fragmentation" // ours, instead of binpack: how usable the node's free GPUs stay (Mix)

	scoreLinks = "device-links" // ours: how the several GPUs of a task would reach each other

	thousand = 1000
)

// maxScores bounds the scores that an allocation keeps in its Metrics.
const maxScores = 3

// host is a node with what is in use there, the placements of this view included.
type host struct {
	node      *cluster.Node
	index     int // in the view's hosts
	hash      uint64
	use       *cluster.NodeUse
	stale     bool   // use is not up to date
	version   uint32 // moves with each change of use
	ports     portRanges
	parsed    bool
	planned   []*cluster.Allocation
	reach     reach
	prices    []int64 // of a thousandth of a device, by group: see Cache.price
	fragments fragments
	rooms     []deviceRoom
	roomAt    uint32 // version + 1 that rooms are of
	leaving   []departure
	leavingOf *quarry // that leaving is of
	quarry    *quarry
	quarryAt  uint64 // the Cache's written when it was looked at
	prospect  *prospect
}

// reservedPorts are those that the node keeps for itself.
func (h *host) reservedPorts() portRanges {
	if !h.parsed {
		h.parsed = true
		if r := h.node.ReservedResources; r != nil {
			h.ports = parsePortRanges(r.Networks.ReservedHostPorts)
		}
	}
	return h.ports
}

// usage adds up what occupies the host, leaving out the allocation without.
func (v *View) usage(h *host, without string) *cluster.NodeUse {
	use := cluster.NewNodeUse(h.node)
	for _, a := range v.reader.AllocsHolding(nil, h.node.ID) {
		if a.ID != without {
			use.Add(a)
		}
	}
	for _, a := range h.planned {
		use.Add(a)
	}
	return use
}

// with gives the host as it is with something else in use.
func (h *host) with(use *cluster.NodeUse) *host {
	c := *h
	c.use, c.stale, c.rooms, c.roomAt, c.fragments, c.prospect = use, false, nil, 0, fragments{}, nil
	return &c
}

// fitsWithout says whether the group's demand would fit on the host if one of the
// host's allocations, which no longer counts among the job's, were over.
func (p *planner) fitsWithout(g *group, nodes *search, h *host, without string) bool {
	freed := h.with(p.usage(h, without))
	return nodes.refusal(h.index, p.onJob.on(h.index), p.onGroup[g.name].on(h.index)) == admitted &&
		nodes.demand.filter(h.node) == "" && nodes.demand.exhausted(freed) == ""
}

// candidates are the nodes that may run what is demanded, each with how it stood
// when it was looked at last. They are the same for all groups that demand the same.
type candidates struct {
	demand *demand
	spread bool
	mix    *Mix                // by what growth is told; nil: by packing alone
	metric cluster.AllocMetric // what is the same for every placement
	list   []candidate
	at     []int32 // by index of the host: its place in list, -1 for none
	seen   moment  // of the changes that list has taken in
	vain   map[attempt]*futility
	linked bool // the demand wants several devices, and nodes tell how theirs are linked
	// Counts over list, kept as candidates change.
	exhausted      map[string]int
	classExhausted map[string]int
}

// candidate is one node.
type candidate struct {
	host      *host
	exhausted string // the dimension that is full
	growth    int64  // of its fragmentation, see Mix
	fragment  int32  // … as a score
	tight     int32  // packing, where it decides between equal growth
	packing   int32  // score by what would be left free
	affinity  int32  // score by the demand's affinities
	devices   int32  // score by those of its devices
	links     int32  // score by how what it would give is linked
	sum       int32  // of these scores
	applied   int32  // how many they are
	version   uint32 // of the host, when it was judged
	spare     bool   // it has devices to spare that the demand has no use for
}

// newCandidates filters all nodes once.
func newCandidates(hosts []*host, d *demand, spread bool) *candidates {
	c := &candidates{demand: d, spread: spread, exhausted: map[string]int{}, classExhausted: map[string]int{}, vain: map[attempt]*futility{}}
	m := &c.metric
	m.NodePool = nodePool(d.job.NodePool)
	m.NodesAvailable = map[string]int{}
	for _, dc := range d.job.Datacenters {
		if !slices.ContainsFunc([]byte(dc), func(b byte) bool { return b == '*' || b == '?' || b == '[' }) {
			m.NodesAvailable[dc] = 0 // so that the reason names the datacenter that has none
		}
	}
	m.ClassFiltered, m.ConstraintFiltered = map[string]int{}, map[string]int{}
	c.at = make([]int32, len(hosts))
	for i, h := range hosts {
		n := h.node
		c.at[i] = -1
		if !n.Ready() || n.NodeResources == nil || !n.InPool(m.NodePool) {
			continue
		}
		m.NodesInPool++
		if !cluster.InDatacenters(d.job.Datacenters, n.Datacenter) {
			continue
		}
		m.NodesAvailable[n.Datacenter]++
		m.NodesEvaluated++
		if reason := d.filter(n); reason != "" {
			m.NodesFiltered++
			m.ConstraintFiltered[reason]++
			if n.NodeClass != "" {
				m.ClassFiltered[n.NodeClass]++
			}
			continue
		}
		c.at[i] = int32(len(c.list))
		c.list = append(c.list, candidate{host: h, affinity: int32(d.affinity(n))})
	}
	c.linked = d.wantsLinks() && anyLinked(c.list)
	return c
}

// search looks for nodes for one group of a job.
type search struct {
	*candidates
	view    *View
	demand  *demand // of this group, with its tasks
	seed    uint64  // orders equal scores; depends on the evaluation, so that plans made side by side seldom meet
	limits  []*limit
	spreads []*spread
	weights int64   // of all spreads
	within  *domain // of a gang's topology, nil for all nodes
	without *host   // that is left out, nil for none
}

func (p *planner) newSearch(j *cluster.Job, g *cluster.TaskGroup) *search {
	d := newDemand(j, g)
	s := &search{candidates: p.candidatesFor(d), view: p.View, demand: d, seed: hash(p.in.Eval.ID)}
	for _, x := range d.distinct {
		c := p.census(x.target, x.group)
		s.limits = append(s.limits, &limit{census: c, allowed: x.allowed, refused: make([]int32, len(c.values))})
	}
	for _, b := range spreadsOf(j, g) {
		s.spreads = append(s.spreads, newSpread(b, p.census(b.Attribute, g.Name), s.list))
		s.weights += int64(b.Weight)
	}
	return s
}

// choice is a node that can take a placement.
type choice struct {
	*candidate
	group  int   // live allocations of the group there
	avoid  bool  // something of the group failed there
	spread int64 // score by the group's spreads
	norm   int64
	lot    uint64 // by growth, so that packing decides only where that is the same
	tie    uint64
}

func (a *choice) better(b *choice) bool {
	switch {
	case b.candidate == nil:
		return true
	case a.norm != b.norm:
		return a.norm > b.norm
	case a.lot != b.lot:
		return a.lot < b.lot
	case a.tight != b.tight:
		return a.tight > b.tight
	}
	return a.tie < b.tie
}

// tallies counts a job's live allocations by the index of their host; nil: none.
type tallies []int32

func (t tallies) on(host int) int {
	if t == nil {
		return 0
	}
	return int(t[host])
}

// refusal says which of the rules about the job's other allocations keeps a placement
// off a host.
type refusal int

const (
	admitted     refusal = -1
	refusedHosts refusal = -2 // distinct_hosts; from 0 on: the place of one of limits
)

// bound says whether some hosts may be left out or refused, whatever they have left.
func (s *search) bound() bool {
	return s.within != nil || s.without != nil || s.demand.distinctHosts || s.demand.distinctInGroup || len(s.limits) > 0
}

func (s *search) refusal(host, job, group int) refusal {
	if s.demand.distinctHosts && job > 0 || s.demand.distinctInGroup && group > 0 {
		return refusedHosts
	}
	for i, l := range s.limits {
		if l.full(host) {
			return refusal(i)
		}
	}
	return admitted
}

// best finds the node with the highest score for one placement; nil when none
// can take it. Nodes in avoid are taken only when they are still the best with a
// penalty. job and group say how many live allocations there are on each node.
func (s *search) best(avoid []string, job, group tallies) (*host, *cluster.AllocMetric) {
	var top [maxScores]choice
	var refused refusals
	s.catchUp()
	s.weighSpreads(job, group)
	bound := s.bound()
	for i := range s.list {
		k := &s.list[i]
		host := k.host.index
		if bound {
			if s.outside(host) {
				continue
			}
			if r := s.refusal(host, job.on(host), group.on(host)); r != admitted {
				if r == refusedHosts {
					refused.hosts++
				} else {
					l := s.limits[r]
					l.refused[l.of[host]]++
				}
				if k.exhausted != "" {
					refused.full = append(refused.full, k)
				}
				continue
			}
		}
		if k.exhausted != "" {
			continue
		}
		x := choice{candidate: k, group: group.on(host)}
		x.avoid = len(avoid) > 0 && slices.Contains(avoid, k.host.node.ID)
		if len(s.spreads) > 0 {
			x.spread = s.spread(host)
		}
		x.norm = s.norm(&x)
		if last := &top[maxScores-1]; last.candidate != nil && x.norm < last.norm {
			continue
		}
		x.tie = mix(s.seed ^ k.host.hash)
		if len(s.demand.devices) > 0 {
			x.lot = mix(s.seed ^ uint64(k.growth))
		}
		for j := range top {
			if x.better(&top[j]) {
				copy(top[j+1:], top[j:])
				top[j] = x
				break
			}
		}
	}
	m := s.metrics(refused)
	for i := range top {
		if x := &top[i]; x.candidate != nil {
			m.ScoreMetaData = append(m.ScoreMetaData, &cluster.NodeScore{NodeID: x.host.node.ID, Scores: s.scores(x), Norm: x.norm})
		}
	}
	if top[0].candidate == nil {
		return nil, m
	}
	return top[0].host, m
}

// weighSpreads scores the values of the group's spreads for one placement.
func (s *search) weighSpreads(job, group tallies) {
	if len(s.spreads) == 0 {
		return
	}
	for i := range s.list {
		k := &s.list[i]
		host := k.host.index
		if k.exhausted != "" || s.outside(host) || s.refusal(host, job.on(host), group.on(host)) != admitted {
			continue
		}
		for _, x := range s.spreads {
			if v := x.of[host]; v >= 0 {
				x.open[v] = true
			}
		}
	}
	for _, x := range s.spreads {
		x.weigh()
	}
}

// spread scores a host by all spreads of the group.
func (s *search) spread(host int) int64 {
	sum := int64(0)
	for _, x := range s.spreads {
		sum += x.weighted(host)
	}
	return sum / s.weights
}

// mix spreads the bits of a number (the finalizer of MurmurHash3).
func mix(x uint64) uint64 {
	x ^= x >> 33
	x *= 0xff51afd7ed558ccd
	x ^= x >> 33
	x *= 0xc4ceb9fe1a85ec53
	return x ^ x>>33
}

// norm is the mean of the scores that apply to a choice.
func (s *search) norm(x *choice) int64 {
	sum, n := int64(x.sum), int64(x.applied)
	if len(s.spreads) > 0 {
		sum, n = sum+x.spread, n+1
	}
	if x.group > 0 {
		sum, n = sum+s.antiAffinity(x), n+1
	}
	if x.avoid {
		sum, n = sum-thousand, n+1
	}
	if n == 1 {
		return sum // as most are
	}
	return sum / n
}

func (s *search) antiAffinity(x *choice) int64 {
	return -int64(x.group+1) * thousand / int64(max(s.demand.group.Count, 1))
}

// scores names what norm is made of.
func (s *search) scores(x *choice) map[string]int64 {
	scores := map[string]int64{scoreBinpack: int64(x.packing)}
	switch {
	case s.candidates.spread:
		scores = map[string]int64{scoreSpread: int64(x.packing)}
	case s.mix != nil:
		scores = map[string]int64{scoreFragment: int64(x.fragment)}
	}
	if len(s.demand.affinities) > 0 {
		scores[scoreAffinity] = int64(x.affinity)
	}
	if s.demand.prefersDevices() {
		scores[scoreDevices] = int64(x.devices)
	}
	if s.candidates.linked {
		scores[scoreLinks] = int64(x.links)
	}
	if len(s.spreads) > 0 {
		scores[scoreSpreads] = x.spread
	}
	if x.spare {
		scores[scoreSpareGPU] = -thousand
	}
	if x.group > 0 {
		scores[scoreAnti] = s.antiAffinity(x)
	}
	if x.avoid {
		scores[scoreAvoid] = -thousand
	}
	return scores
}

// refresh judges a candidate anew and keeps the counts right.
func (s *search) refresh(k *candidate) {
	s.view.load(k.host)
	k.version = k.host.version
	s.countExhausted(k, -1)
	k.exhausted = s.candidates.demand.exhausted(k.host)
	s.countExhausted(k, 1)
	if k.exhausted == "" {
		k.links = int32(linkScore(s.candidates.demand.common())) // of what exhausted has just tried
		s.candidates.rate(k)
	}
}

// rate scores a candidate by all that does not depend on the job's other allocations.
func (c *candidates) rate(k *candidate) {
	packing, spare := c.score(k.host)
	k.packing, k.spare = int32(packing), spare
	k.sum, k.applied = k.packing, 1
	if m := c.mix; m != nil {
		k.growth = m.growth(k.host, c.demand)
		k.fragment, k.tight = int32(m.score(k.growth)), c.tight(k)
		k.sum, k.spare = k.fragment, false
	}
	if k.spare {
		k.sum, k.applied = k.sum-thousand, k.applied+1
	}
	if c.linked {
		k.sum, k.applied = k.sum+k.links, k.applied+1
	}
	if len(c.demand.affinities) > 0 {
		k.sum, k.applied = k.sum+k.affinity, k.applied+1
	}
	if c.demand.prefersDevices() {
		k.devices = int32(c.demand.deviceAffinity(k.host))
		k.sum, k.applied = k.sum+k.devices, k.applied+1
	}
}

// tight orders nodes where work makes the same difference to their devices: the one with most of them in use; work without devices
// goes to nodes that have none, else to one where none is free. How full processor and memory are has no part in it
// where there are devices: packing them early leaves GPUs that nobody can use.
func (c *candidates) tight(k *candidate) int32 {
	room := k.host.room()
	switch {
	case len(room) == 0:
		return k.packing
	case len(c.demand.devices) > 0:
		idle := int64(0)
		for i := range room {
			idle += room[i].milli
		}
		return int32(-idle / int64(len(room)))
	case k.spare:
		return -thousand
	}
	return 0
}

// catchUp judges anew where something has changed since the last time.
func (s *search) catchUp() {
	c, cache := s.candidates, s.view.Cache
	if since, known := cache.since(c.seen); known {
		for _, host := range since {
			if i := c.at[host]; i >= 0 && c.list[i].version != c.list[i].host.version {
				s.refresh(&c.list[i])
			}
		}
	} else {
		for i := range c.list {
			s.refresh(&c.list[i])
		}
	}
	c.seen = cache.moment()
}

func (c *candidates) countExhausted(k *candidate, by int) {
	countExhausted(c.exhausted, c.classExhausted, k, by)
}

// countExhausted counts a full node by dimension and class; what comes to nothing
// leaves no trace.
func countExhausted(dimensions, classes map[string]int, k *candidate, by int) {
	if k.exhausted == "" {
		return
	}
	count(dimensions, k.exhausted, by)
	if class := k.host.node.NodeClass; class != "" {
		count(classes, class, by)
	}
}

func count(m map[string]int, key string, by int) {
	if m[key] += by; m[key] == 0 {
		delete(m, key)
	}
}

// refusals are the nodes that a look at all of them has refused for the job's other
// allocations; limits count theirs themselves.
type refusals struct {
	hosts int          // by distinct_hosts
	full  []*candidate // those that are exhausted besides
}

// metrics gives the counts for one placement, or for its failure. Nodes that are
// refused count as filtered, whether they are full or not.
func (s *search) metrics(refused refusals) *cluster.AllocMetric {
	m := s.metric
	m.DimensionExhausted, m.ClassExhausted = maps.Clone(s.exhausted), maps.Clone(s.classExhausted)
	if refused.hosts > 0 || len(s.limits) > 0 {
		m.ConstraintFiltered = maps.Clone(m.ConstraintFiltered)
	}
	if refused.hosts > 0 {
		m.NodesFiltered += refused.hosts
		m.ConstraintFiltered[operandDistinctHosts] += refused.hosts
	}
	for _, l := range s.limits {
		m.NodesFiltered += l.reasons(m.ConstraintFiltered)
	}
	for _, k := range refused.full {
		countExhausted(m.DimensionExhausted, m.ClassExhausted, k, -1)
	}
	for _, n := range m.DimensionExhausted {
		m.NodesExhausted += n
	}
	return &m
}

// score rates a host for one more allocation by what would be left free, and says
// whether it has devices to spare.
func (c *candidates) score(h *host) (packing int64, spare bool) {
	d := c.demand
	cpu, memory, _ := h.node.Available()
	free := [3]int64{
		share(cpu-h.use.CPU-d.cpu, cpu),
		share(memory-h.use.Memory-d.memory, memory),
	}
	n := 2
	healthy, idle := h.deviceCount()
	if len(d.devices) > 0 {
		asked := int64(0)
		for _, a := range d.devices {
			asked += int64(a.count)
		}
		free[2], n = share(idle-asked, healthy), 3
	}
	// The emptier a node stays, the lower its packing; squares make one nearly
	// full dimension count more than two half full ones.
	waste := int64(0)
	for _, f := range free[:n] {
		waste += f * f / thousand
	}
	waste /= int64(n)
	if !c.spread {
		waste = thousand - waste
	}
	return waste, len(d.devices) == 0 && idle > 0
}

// share is part/whole in thousandths, 0 for a node that has none.
func share(part, whole int64) int64 {
	if whole <= 0 || part <= 0 {
		return 0
	}
	return part * thousand / whole
}

// deviceCount counts the host's healthy devices and those of them that are free.
func (h *host) deviceCount() (healthy, idle int64) {
	room := h.room()
	for i := range room {
		if room[i].whole {
			idle++
		}
	}
	return int64(len(room)), idle
}
