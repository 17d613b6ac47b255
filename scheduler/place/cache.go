package place

import (
	"encoding/binary"
	"slices"

	"github.com/rxvision/rxvision/cluster"
)

// maxJudged bounds the judged nodes that a Cache keeps, over all demands: 160 kinds of work on 10,000 nodes. One takes some
// 75 bytes; judging it anew, where there are many kinds of work, takes microseconds.
const maxJudged = 1_600_000

// Cache carries what was worked out on one snapshot over to the next: which nodes
// can run what, what they have in use, how well it fits. Of that it takes only what
// the snapshots say is the same, so that it changes no answer. The zero value is
// ready; it belongs to one goroutine, and the View that it gave last is the one that
// may be used.
type Cache struct {
	version   any      // of the nodes
	hosts     []*host  // by node ID
	ids       []string // of hosts
	holding   []any    // what stands for what their use adds up
	byID      map[string]*host
	planned   []*host      // with placements of the last view
	vacated   map[int]bool // hosts with what the last view preempts
	disturbed []int32      // … and with what else its plans stop or update
	changes   []int32      // indexes of hosts that have changed, oldest first
	era       uint64       // moves when changes begins anew; then all may have changed

	judged     map[string]*candidates // by demand
	order      []string               // … the oldest first
	properties map[string]*property   // by attribute
	mix        *Mix
	priced     bool // the hosts' prices are those of mix
	occupants  int  // in the quarries of hosts
	views      uint64
	records    any    // what stands for all allocations
	written    uint64 // moves when they change: what is kept of a host holds on to no old ones
}

// Expect says what work to keep GPUs usable for; nil: for none, work is packed by what
// nodes have left. It holds for the views that are made from now on.
func (c *Cache) Expect(m *Mix) {
	if m != c.mix {
		c.mix, c.priced, c.judged, c.order = m, false, map[string]*candidates{}, nil
	}
}

// View prepares a snapshot.
func (c *Cache) View(r Reader) *View {
	for _, h := range c.planned {
		for _, a := range h.planned {
			h.use.Remove(a)
		}
		h.planned = nil
		c.forget(h)
	}
	c.planned = c.planned[:0]
	for i := range c.vacated {
		c.changed(c.hosts[i])
	}
	c.vacated = map[int]bool{}
	for _, i := range c.disturbed {
		c.changed(c.hosts[i])
	}
	c.disturbed = c.disturbed[:0]
	if c.occupants > maxOccupants {
		for _, h := range c.hosts {
			h.quarry, h.prospect = nil, nil
		}
		c.occupants = 0
	}
	if v := r.NodesVersion(); c.hosts == nil || v != c.version {
		c.version = v
		c.takeNodes(r.Nodes(nil, ""))
	}
	c.takeUse(r)
	if v := r.AllocsVersion(); v != c.records {
		c.records, c.written = v, c.written+1
	}
	c.price()
	c.views++
	v := &View{
		number: c.views,
		Cache:  c, reader: r, config: r.SchedulerConfig(nil), freeze: r.FleetHold(nil), index: r.Index(nil),
		settled: map[settlement]bool{}, evictions: map[string]bool{}, stopping: map[string]bool{}, updated: map[string]bool{},
		tenants: tenants{map[string]*cluster.Usage{}, map[string]*cluster.Allowance{}, map[cluster.JobKey]int{}, map[string][]cluster.Borrowed{}},
	}
	for _, e := range r.Claims() {
		v.stand(e.JobKey(), e.Priority, e.Claims)
	}
	return v
}

// takeNodes begins with other nodes; what those that stay have in use is still true.
func (c *Cache) takeNodes(nodes []*cluster.Node) {
	old := c.byID
	holding := c.holding
	c.hosts, c.byID = make([]*host, len(nodes)), make(map[string]*host, len(nodes))
	c.ids, c.holding = make([]string, len(nodes)), make([]any, len(nodes))
	for i, n := range nodes {
		h := &host{node: n, index: i, hash: hash(n.ID)}
		if was := old[n.ID]; was != nil {
			h.use, h.stale, h.reach, h.version, c.holding[i] = was.use, true, was.reach, was.version, holding[was.index]
		}
		c.hosts[i], c.ids[i], c.byID[n.ID] = h, n.ID, h
	}
	c.priced, c.judged, c.order, c.properties, c.occupants = false, map[string]*candidates{}, nil, nil, 0
	c.changes, c.era = c.changes[:0], c.era+1
}

// takeUse forgets what is in use on the hosts where that has changed.
func (c *Cache) takeUse(r Reader) {
	i := 0
	next := func(version any) {
		if c.holding[i] != version {
			c.holding[i] = version
			c.forget(c.hosts[i])
		}
		i++
	}
	r.HoldingVersions(func(nodeID string, version any) {
		for i < len(c.ids) && c.ids[i] < nodeID {
			next(nil)
		}
		if i < len(c.ids) && c.ids[i] == nodeID {
			next(version)
		}
	})
	for i < len(c.ids) {
		next(nil)
	}
}

// forget marks what is in use on a host as not up to date.
func (c *Cache) forget(h *host) {
	h.stale = true
	c.changed(h)
}

func (c *Cache) changed(h *host) {
	h.version++
	c.note(h)
}

// note counts a host among those that have changed, in use or otherwise.
func (c *Cache) note(h *host) {
	if len(c.changes) > 8*len(c.hosts) {
		c.changes, c.era = c.changes[:0], c.era+1
	}
	c.changes = append(c.changes, int32(h.index))
}

// disturb notes that a plan of this view stops or updates an allocation: whether it is applied shows in the next view.
func (c *Cache) disturb(a *cluster.Allocation) {
	if h := c.byID[a.NodeID]; h != nil {
		c.disturbed = append(c.disturbed, int32(h.index))
		c.changed(h)
	}
}

// moment is how much of the changes of hosts is known.
type moment struct {
	era  uint64
	seen int
}

func (c *Cache) moment() moment { return moment{c.era, len(c.changes)} }

// since gives the hosts that have changed since a moment, some of them more than once; not known: all may have.
func (c *Cache) since(m moment) (hosts []int32, known bool) {
	if m.era != c.era {
		return nil, false
	}
	return c.changes[m.seen:], true
}

// load adds up what is in use on the host, where that is not known.
func (v *View) load(h *host) {
	if h.use != nil && !h.stale {
		return
	}
	if h.use == nil {
		h.use = cluster.NewNodeUse(h.node)
	}
	if anew := h.use.Follow(h.node, v.reader.AllocsHolding(nil, h.node.ID)); anew {
		for _, a := range h.planned {
			h.use.Add(a)
		}
	}
	h.stale, h.roomAt = false, 0
}

// plan counts a placement of this view.
func (v *View) plan(h *host, a *cluster.Allocation) {
	if len(h.planned) == 0 {
		v.planned = append(v.planned, h)
	}
	h.planned = append(h.planned, a)
	h.use.Add(a)
	v.changed(h)
}

// unplan takes a placement of this view back.
func (v *View) unplan(h *host, a *cluster.Allocation) {
	i := slices.Index(h.planned, a)
	h.planned = slices.Delete(h.planned, i, i+1)
	h.use.Remove(a)
	v.changed(h)
}

// candidatesFor gives the nodes for a demand, judged before where they are.
func (v *View) candidatesFor(d *demand) *candidates {
	d.oversubscribe = v.config.MemoryOversubscriptionEnabled
	spread := v.config.SchedulerAlgorithm == "spread"
	key := string(d.key(spread))
	if c := v.judged[key]; c != nil {
		return c
	}
	c := newCandidates(v.hosts, d, spread)
	if !spread {
		c.mix = v.mix
	}
	for n := (len(v.order) + 1) * len(v.hosts); n > maxJudged && len(v.order) > 0; n -= len(v.hosts) {
		delete(v.judged, v.order[0])
		v.order = v.order[1:]
	}
	v.judged[key], v.order = c, append(v.order, key)
	return c
}

// key holds all that says which nodes suit the demand, and how well.
func (d *demand) key(spread bool) []byte {
	b := make([]byte, 0, 256)
	text := func(ss ...string) {
		for _, s := range ss {
			b = binary.AppendUvarint(b, uint64(len(s)))
			b = append(b, s...)
		}
	}
	number := func(n int64) { b = binary.AppendVarint(b, n) }
	flag := func(on bool) {
		if on {
			b = append(b, 1)
		} else {
			b = append(b, 0)
		}
	}
	constraints := func(list []*cluster.Constraint) {
		number(int64(len(list)))
		for _, c := range list {
			text(c.LTarget, c.Operand, c.RTarget)
		}
	}
	affinities := func(list []*cluster.Affinity) {
		number(int64(len(list)))
		for _, a := range list {
			text(a.LTarget, a.Operand, a.RTarget)
			number(int64(a.Weight))
		}
	}
	flag(spread)
	flag(d.oversubscribe)
	flag(d.distinctHosts)
	flag(d.distinctInGroup)
	number(d.cpu)
	number(d.memory)
	number(d.disk)
	text(d.job.NodePool, d.spot)
	number(int64(len(d.job.Datacenters)))
	text(d.job.Datacenters...)
	number(int64(len(d.drivers)))
	text(d.drivers...)
	constraints(d.constraints)
	number(int64(len(d.distinct)))
	for _, x := range d.distinct {
		text(x.target)
	}
	affinities(d.affinities)
	number(int64(len(d.networks)))
	for _, n := range d.networks {
		for _, ports := range [][]cluster.Port{n.ReservedPorts, n.DynamicPorts} {
			number(int64(len(ports)))
			for _, p := range ports {
				text(p.Label)
				number(int64(p.Value))
			}
		}
	}
	number(int64(len(d.devices)))
	for _, a := range d.devices {
		text(a.name)
		number(int64(a.count))
		number(a.milli)
		number(a.mib)
		constraints(a.constraints)
		affinities(a.affinities)
	}
	return b
}
