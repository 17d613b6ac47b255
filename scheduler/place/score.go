package place

import (
	"maps"
	"slices"

	"github.com/rxvision/rxvision/cluster"
)

// Scores are in thousandths: 1000 is best, negative ones push away. A node's
// score is the mean of those that apply to it; their names are upstream's.
const (
	scoreBinpack  = "binpack"
	scoreSpread   = "spread"
	scoreAnti     = "job-anti-affinity"
	scoreAvoid    = "node-reschedule-penalty"
	scoreSpareGPU = "device-protection" // ours: work without devices leaves device nodes alone

	thousand = 1000
)

// maxScores bounds the scores that an allocation keeps in its Metrics.
const maxScores = 3

// host is a node with what is in use there, the placements of this view included.
type host struct {
	node     *cluster.Node
	use      *cluster.NodeUse
	ports    portRanges
	parsed   bool
	planned  []*cluster.Allocation
	revision int // moves when use, or what the job has there, changes
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

// load reads what is in use on the host, once.
func (v *View) load(h *host) {
	if h.use == nil {
		h.use = v.usage(h, "")
	}
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

// fitsWithout says whether the demand would fit on the host if one of the host's
// allocations were over.
func (v *View) fitsWithout(d *demand, h *host, without string) bool {
	freed := *h
	freed.use = v.usage(h, without)
	return d.filter(h.node) == "" && d.exhausted(&freed) == ""
}

// candidates are the nodes that may take allocations of one group, with their
// state as of the last placement.
type candidates struct {
	view   *View
	demand *demand
	spread bool
	metric cluster.AllocMetric // what is the same for every placement
	list   []candidate
	// Counts over list, kept as candidates change.
	distinct       int
	exhausted      map[string]int
	classExhausted map[string]int
}

// candidate is one node. Its state is good while revision is the host's.
type candidate struct {
	host      *host
	revision  int
	distinct  bool   // another allocation is there and distinct_hosts forbids it
	exhausted string // the dimension that is full
	scores    map[string]int64
	sum       int64
	tie       uint64 // orders equal scores; depends on the evaluation, so that plans made side by side seldom meet
}

// newCandidates filters all nodes once.
func (v *View) newCandidates(d *demand, evalID string) *candidates {
	c := &candidates{
		view: v, demand: d, spread: v.config.SchedulerAlgorithm == "spread",
		exhausted: map[string]int{}, classExhausted: map[string]int{},
	}
	d.oversubscribe = v.config.MemoryOversubscriptionEnabled
	m := &c.metric
	m.NodePool = nodePool(d.job.NodePool)
	m.NodesAvailable = map[string]int{}
	for _, dc := range d.job.Datacenters {
		if !slices.ContainsFunc([]byte(dc), func(b byte) bool { return b == '*' || b == '?' || b == '[' }) {
			m.NodesAvailable[dc] = 0 // so that the reason names the datacenter that has none
		}
	}
	m.ClassFiltered, m.ConstraintFiltered = map[string]int{}, map[string]int{}
	for _, h := range v.hosts {
		n := h.node
		if !n.Ready() || n.NodeResources == nil || !inPool(m.NodePool, n) {
			continue
		}
		m.NodesInPool++
		if !inDatacenters(d.job.Datacenters, n.Datacenter) {
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
		c.list = append(c.list, candidate{host: h, revision: -1, tie: hash(evalID, n.ID)})
	}
	return c
}

// choice is a node that can take a placement.
type choice struct {
	*candidate
	avoid bool
	norm  int64
}

func (a choice) better(b choice) bool {
	switch {
	case b.candidate == nil:
		return true
	case a.norm != b.norm:
		return a.norm > b.norm
	}
	return a.tie < b.tie
}

// best finds the node with the highest score for one placement; nil when none
// can take it. Nodes in avoid are taken only when they are still the best with a
// penalty. live says how many allocations the job, and the group, have on a node.
func (c *candidates) best(avoid []string, live func(nodeID string) (job, group int)) (*host, *cluster.AllocMetric) {
	var top [maxScores]choice
	for i := range c.list {
		k := &c.list[i]
		if k.revision != k.host.revision {
			c.refresh(k, live)
		}
		if k.distinct || k.exhausted != "" {
			continue
		}
		x := choice{candidate: k, avoid: slices.Contains(avoid, k.host.node.ID)}
		x.norm = k.sum / int64(len(k.scores))
		if x.avoid {
			x.norm = (k.sum - thousand) / int64(len(k.scores)+1)
		}
		for j := range top {
			if x.better(top[j]) {
				copy(top[j+1:], top[j:])
				top[j] = x
				break
			}
		}
	}
	m := c.metrics()
	for _, x := range top {
		if x.candidate == nil {
			break
		}
		scores := x.scores
		if x.avoid {
			scores = maps.Clone(scores)
			scores[scoreAvoid] = -thousand
		}
		m.ScoreMetaData = append(m.ScoreMetaData, &cluster.NodeScore{NodeID: x.host.node.ID, Scores: scores, Norm: x.norm})
	}
	if top[0].candidate == nil {
		return nil, m
	}
	return top[0].host, m
}

// refresh judges a candidate anew and keeps the counts right.
func (c *candidates) refresh(k *candidate, live func(string) (job, group int)) {
	c.view.load(k.host)
	if k.distinct {
		c.distinct--
	}
	c.countExhausted(k, -1)
	job, group := live(k.host.node.ID)
	k.distinct = (c.demand.distinctHosts && job > 0) || (c.demand.distinctInGroup && group > 0)
	k.exhausted = ""
	if k.distinct {
		c.distinct++
	} else {
		k.exhausted = c.demand.exhausted(k.host)
		c.countExhausted(k, 1)
	}
	if !k.distinct && k.exhausted == "" {
		k.scores = c.score(k.host, group)
		k.sum = 0
		for _, s := range k.scores {
			k.sum += s
		}
	}
	k.revision = k.host.revision
}

func (c *candidates) countExhausted(k *candidate, by int) {
	if k.exhausted == "" {
		return
	}
	c.exhausted[k.exhausted] += by
	if class := k.host.node.NodeClass; class != "" {
		c.classExhausted[class] += by
	}
}

// metrics gives the counts for one placement, or for its failure.
func (c *candidates) metrics() *cluster.AllocMetric {
	m := c.metric
	m.DimensionExhausted, m.ClassExhausted = map[string]int{}, map[string]int{}
	for k, n := range c.exhausted {
		if n > 0 {
			m.DimensionExhausted[k] = n
			m.NodesExhausted += n
		}
	}
	for k, n := range c.classExhausted {
		if n > 0 {
			m.ClassExhausted[k] = n
		}
	}
	if c.distinct > 0 {
		m.NodesFiltered += c.distinct
		m.ConstraintFiltered = maps.Clone(m.ConstraintFiltered)
		m.ConstraintFiltered[operandDistinctHosts] += c.distinct
	}
	return &m
}

// score rates a host for one more allocation; there are group of them already.
func (c *candidates) score(h *host, group int) map[string]int64 {
	d := c.demand
	cpu, memory, _ := h.node.Available()
	free := []int64{
		share(cpu-h.use.CPU-d.cpu, cpu),
		share(memory-h.use.Memory-d.memory, memory),
	}
	healthy, idle := h.deviceCount()
	if len(d.devices) > 0 {
		asked := int64(0)
		for _, a := range d.devices {
			asked += int64(a.request.Count)
		}
		free = append(free, share(idle-asked, healthy))
	}
	// The emptier a node stays, the lower its packing; squares make one nearly
	// full dimension count more than two half full ones.
	waste := int64(0)
	for _, f := range free {
		waste += f * f / thousand
	}
	waste /= int64(len(free))
	scores := map[string]int64{}
	if c.spread {
		scores[scoreSpread] = waste
	} else {
		scores[scoreBinpack] = thousand - waste
	}
	if group > 0 {
		scores[scoreAnti] = -int64(group+1) * thousand / int64(max(d.group.Count, 1))
	}
	if len(d.devices) == 0 && idle > 0 {
		scores[scoreSpareGPU] = -thousand
	}
	return scores
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
	for _, g := range h.node.NodeResources.Devices {
		for _, d := range g.Instances {
			if !d.Healthy {
				continue
			}
			healthy++
			if _, held := h.use.Devices[d.ID]; !held {
				idle++
			}
		}
	}
	return healthy, idle
}
