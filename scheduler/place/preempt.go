package place

import (
	"cmp"
	"math"
	"slices"

	"github.com/rxvision/rxvision/cluster"
)

// PriorityGap is by how much the priority of what is preempted is at least lower, as in Nomad
// (https://developer.hashicorp.com/nomad/docs/concepts/scheduling/preemption).
const PriorityGap = 10

// Descriptions of what preemption does; the first is upstream's.
const (
	descPreempted = "Preempted by alloc ID "

	DescClaims   = "created to place allocations once others have left their places"
	DescRequeued = "created to place allocations again once they have ended"
	DescProtect  = "created for the end of a guaranteed run time"
)

// evicted says whether the allocation was preempted.
func evicted(a *cluster.Allocation) bool { return a.DesiredStatus == cluster.AllocDesiredEvict }

// preempts says whether the job may preempt others.
func (p *planner) preempts() bool {
	c := p.config.PreemptionConfig
	switch p.job.Type {
	case cluster.JobTypeService:
		return c.ServiceSchedulerEnabled && !p.job.AllAtOnce
	case cluster.JobTypeBatch:
		return c.BatchSchedulerEnabled && !p.job.AllAtOnce
	}
	return false
}

// missing is what found no room: one allocation, or a gang.
type missing struct {
	group  *group
	nodes  *search
	wants  []want
	metric *cluster.AllocMetric
}

// miss puts aside what found no room. What may be preempted for it is looked at when
// the plan has done all that it can without.
func (p *planner) miss(g *group, nodes *search, wants []want, metric *cluster.AllocMetric) {
	p.missed = append(p.missed, missing{g, nodes, wants, metric})
}

// makeRoom preempts for what found no room, and notes what fails all the same.
func (p *planner) makeRoom() {
	protected := cluster.Time(0)
	for _, m := range p.missed {
		first := p.result.Failed[m.group.name]
		if first != nil {
			first.CoalescedFailures++
			continue
		}
		if p.job != nil && !p.result.More && p.preempts() {
			if e := p.excessOfClaims(m.group, len(m.wants)); e != nil {
				m.metric.QuotaExhausted, p.quota = e.reasons, e.allowance.Quota
				p.result.Failed[m.group.name] = m.metric
				continue
			}
			if p.consolidate(m) {
				continue
			}
			until, vain := p.isVain(m)
			if !vain {
				t := p.newTrial(m.group, m.nodes, true)
				if t.run(m.wants) {
					p.commit(t)
					continue
				}
				until = t.protected
				p.wasVain(m, t)
			}
			if until != 0 && (protected == 0 || until < protected) {
				protected = until
			}
		}
		p.result.Failed[m.group.name] = m.metric
	}
	if protected != 0 && !p.awaitsTime() {
		e := p.newEval(cluster.TriggerPreemption, DescProtect)
		e.Status, e.WaitUntil = cluster.EvalStatusPending, protected
		p.followups = append(p.followups, e)
	}
}

// awaitsTime says whether the end of a guaranteed run time is waited for already.
func (p *planner) awaitsTime() bool {
	return slices.ContainsFunc(p.reader.OpenEvalsByJob(p.in.Eval.JobKey()), func(e *cluster.Evaluation) bool {
		return e.ID != p.in.Eval.ID && e.TriggeredBy == cluster.TriggerPreemption && e.Status == cluster.EvalStatusPending && e.WaitUntil > p.in.Now
	})
}

// unit is what is preempted together: an allocation, or a gang.
type unit struct {
	members  []*cluster.Allocation
	priority int
	borrowed bool
	lost     int64 // seconds of work since the last checkpoints, times thousandths of devices
	devices  int64 // thousandths that it holds
	size     int64 // … on the host that is looked at
}

// cost says how bad it is to preempt some units; the fields in order.
type cost struct {
	priority int   // the highest
	owned    int   // those that borrow nothing
	lost     int64 // work
	devices  int64 // freed, needed or not
	n        int   // allocations
}

func costOf(units []*unit) (c cost) {
	for _, u := range units {
		x := u.cost()
		c.priority = max(c.priority, x.priority)
		c.owned, c.lost, c.devices, c.n = c.owned+x.owned, c.lost+x.lost, c.devices+x.devices, c.n+x.n
	}
	return c
}

func (u *unit) cost() cost {
	c := cost{priority: u.priority, lost: u.lost, devices: u.devices, n: len(u.members)}
	if !u.borrowed {
		c.owned = 1
	}
	return c
}

func (c cost) compare(o cost) int {
	return cmp.Or(
		cmp.Compare(c.priority, o.priority), cmp.Compare(c.owned, o.owned), cmp.Compare(c.lost, o.lost),
		cmp.Compare(c.devices, o.devices), cmp.Compare(c.n, o.n),
	)
}

// trial looks where allocations would go once those that are on their way to their end, and
// those that it preempts, have left. It changes nothing but the planner's counts of
// the job's allocations, and takes these back if it fails.
type trial struct {
	*planner
	group     *group
	nodes     *search
	victims   bool              // others may be preempted
	ease      ease              // what is overlooked, to find out what stands in the way
	owed      bool              // … of the same priority, if they run on what they have borrowed
	hosts     map[int]*prospect // of its own
	apart     map[int]bool      // hosts that this plan changes, and those of the job
	claims    []*cluster.Claim
	counted   []*cluster.Allocation
	gone      map[string]bool     // IDs of what it preempts
	uses      []cluster.DeviceUse // memory for the next look at a host
	rooms     []deviceRoom        // …
	units     []*unit             // … as units
	protected cluster.Time        // when the first would be free to be preempted that is not yet; 0: none
	protector string              // the ID of its node
	lenders   []string            // namespaces of which it mattered what they have borrowed
	elsewhere bool                // a gang was spared for the sake of a member on another host
}

func (p *planner) newTrial(g *group, nodes *search, victims bool) *trial {
	t := &trial{planner: p, group: g, nodes: nodes, victims: victims, hosts: map[int]*prospect{}, apart: map[int]bool{}, gone: map[string]bool{}}
	for _, c := range p.claims {
		t.part(p.byID[c.NodeID])
	}
	for _, a := range p.allocs {
		if a.Occupies() {
			t.part(p.byID[a.NodeID])
		}
	}
	return t
}

// run finds places for all wants, with claims on them; false if there are none. Of a
// topology that is required the cheapest domain is taken; preempting goes not after what is only preferred.
func (t *trial) run(wants []want) bool {
	t.owed = t.victims && t.planner.owed(t.group, len(wants))
	gang := t.group.spec.Gang
	if gang == nil || !gang.Required || len(gang.Topology) == 0 {
		return t.runWithin(nil, wants)
	}
	of := t.property(gang.Topology[len(gang.Topology)-1])
	var best *trial
	var within *domain
	for v := range min(len(of.values), maxDomains) {
		d := &domain{property: of, value: int32(v)}
		one := t.newTrial(t.group, t.nodes, t.victims)
		one.owed = t.owed
		if one.runWithin(d, wants) && (best == nil || costOf(one.units).compare(costOf(best.units)) < 0) {
			best, within = one, d
		}
		one.uncount()
		t.protects(one.protected, one.protector)
	}
	return best != nil && t.runWithin(within, wants)
}

func (t *trial) runWithin(d *domain, wants []want) bool {
	t.nodes.within = d
	defer func() { t.nodes.within = nil }()
	t.nodes.catchUp()
	for _, w := range wants {
		if !t.find(w) {
			t.uncount()
			return false
		}
	}
	if t.spare(); !t.allowed() {
		t.uncount()
		return false
	}
	return true
}

// allowed says whether the quota leaves room for the claims, with the devices that they are on; and whether nothing of them
// would be borrowed, if something is taken back for them.
func (t *trial) allowed() bool {
	a := t.allowance(t.job.Namespace)
	if a == nil || !t.victims {
		return true
	}
	by := &cluster.Usage{Namespace: t.job.Namespace}
	for _, c := range slices.Concat(t.planner.claims, t.claims) {
		by.Add(cluster.NewUsage(by.Namespace, c.Resources, t.job.Preemptible()), 1)
	}
	reclaims := slices.ContainsFunc(t.units, func(u *unit) bool { return u.priority+PriorityGap > t.job.Priority })
	return a.Exceeded(by) == nil && (!reclaims || t.ease != easeNothing || a.Own(by))
}

func (t *trial) uncount() {
	for _, a := range t.counted {
		t.count(a, -1)
	}
	t.counted = nil
}

// find gives one want the place where the cheapest must leave, of equal ones the best.
func (t *trial) find(w want) bool {
	t.tally()
	var at *host
	var units []*unit
	var price cost
	var norm int64
	var tie uint64
	for _, l := range t.leads() {
		if at != nil && l.least.compare(price) > 0 {
			break
		}
		th := t.host(l.host)
		var leave []*unit
		if t.nodes.demand.exhausted(th.host) != "" {
			if leave = t.cheapest(l.host); leave == nil {
				continue
			}
		}
		c := costOf(leave)
		if at != nil && c.compare(price) > 0 {
			continue
		}
		judged := candidate{host: th.host, affinity: l.affinity}
		t.nodes.candidates.rate(&judged)
		n, tied := int64(judged.sum/max(judged.applied, 1)), mix(t.nodes.seed^l.host.hash)
		if at == nil || c.compare(price) < 0 || n > norm || n == norm && tied < tie {
			at, units, price, norm, tie = l.host, leave, c, n, tied
		}
	}
	if at == nil {
		return false
	}
	for _, u := range units {
		t.units = append(t.units, u)
		for _, a := range u.members {
			t.gone[a.ID] = true
			t.part(t.byID[a.NodeID])
		}
	}
	t.part(at)
	th := t.host(at).host
	id := t.in.NewID()
	r, err := t.nodes.demand.take(th, id, t.nodes.mix)
	if err != nil {
		return false
	}
	a := &cluster.Allocation{ID: id, NodeID: at.node.ID, TaskGroup: t.group.name, AllocatedResources: r}
	t.count(a, 1)
	t.counted = append(t.counted, a)
	t.claims = append(t.claims, &cluster.Claim{
		AllocID: id, Name: w.name, TaskGroup: t.group.name, JobVersion: t.job.Version, NodeID: at.node.ID, Resources: r,
	})
	t.part(at)
	return true
}

// part notes that this plan changes a host.
func (t *trial) part(h *host) {
	if h != nil {
		t.apart[h.index] = true
		delete(t.hosts, h.index)
	}
}

// future adds up what will be in use on a host, the claims that bind included.
func (t *trial) future(h *host) *cluster.NodeUse {
	use := cluster.NewNodeUse(h.node)
	held := t.quarryOf(h).held
	for i := range held {
		if a := held[i].Allocation; !t.over(a) && !t.gone[a.ID] {
			use.Add(a)
		}
	}
	for _, a := range h.planned {
		if a.JobID != "" { // else it is the rest of claims
			use.Add(a)
		}
	}
	add := func(c *cluster.Claim) {
		if c.NodeID == h.node.ID {
			use.Add(&cluster.Allocation{ID: c.AllocID, AllocatedResources: c.Resources})
		}
	}
	for _, s := range t.standings {
		if s.counted {
			for _, c := range s.claims {
				add(c)
			}
		}
	}
	for _, s := range t.reserves.list {
		if s.counted && s.host.index == h.index {
			use.Add(s.rest)
		}
	}
	for _, c := range t.planner.claims {
		add(c)
	}
	for _, c := range t.claims {
		add(c)
	}
	return use
}

// ease is what a trial overlooks.
type ease int

const (
	easeNothing  ease = iota
	easeKeys          // what groups say of their preemption
	easePriority      // and priorities
)

// overlooks says whether an allocation may be preempted in spite of its shield.
func (e ease) overlooks(kind string) bool {
	switch kind {
	case "":
		return true
	case cluster.ObstacleNever, cluster.ObstacleMinRuntime:
		return e >= easeKeys
	case cluster.ObstaclePriority:
		return e >= easePriority
	}
	return false
}

// beganAt is when an allocation started, or was made if it has not.
func beganAt(a *cluster.Allocation) cluster.Time {
	if at := startedAt(a); at != 0 {
		return at
	}
	return cluster.Time(a.CreateTime)
}

// devicesOf adds up thousandths of devices.
func devicesOf(a *cluster.Allocation) (milli int64) {
	if a.AllocatedResources == nil {
		return 0
	}
	for _, r := range a.AllocatedResources.Tasks {
		for _, d := range r.Devices {
			if d.Shared() {
				milli += d.Milli
			} else {
				milli += int64(len(d.DeviceIDs)) * cluster.WholeMilli
			}
		}
	}
	return milli
}

// spare lets stay what the claims do not need to leave after all, the dearest first.
func (t *trial) spare() {
	slices.SortStableFunc(t.units, func(a, b *unit) int { return b.cost().compare(a.cost()) })
	t.units = slices.DeleteFunc(t.units, func(u *unit) bool {
		for _, a := range u.members {
			delete(t.gone, a.ID)
		}
		for _, a := range u.members {
			if h := t.byID[a.NodeID]; h != nil && slices.ContainsFunc(t.claims, func(c *cluster.Claim) bool { return c.NodeID == a.NodeID }) && t.future(h).Fault() != "" {
				for _, a := range u.members {
					t.gone[a.ID] = true
				}
				return false
			}
		}
		return true
	})
}

// commit makes what a trial has found part of the plan.
func (p *planner) commit(t *trial) {
	for _, c := range t.claims {
		for _, a := range p.reader.AllocsHolding(nil, c.NodeID) {
			if t.over(a) || t.gone[a.ID] {
				c.Awaits = append(c.Awaits, a.ID)
			}
		}
	}
	for _, u := range t.units {
		for _, a := range u.members {
			c := t.claims[0]
			if i := slices.IndexFunc(t.claims, func(c *cluster.Claim) bool { return c.NodeID == a.NodeID }); i >= 0 {
				c = t.claims[i]
			}
			c.Preempts = append(c.Preempts, a.ID)
			p.evict(t.group, a, c.AllocID)
		}
	}
	p.claims = append(p.claims, t.claims...)
}

// evict adds the preemption of an allocation for another that is to be.
func (p *planner) evict(g *group, a *cluster.Allocation, by string) {
	g.counts.Preemptions++
	p.evictions[a.ID] = true
	if h := p.byID[a.NodeID]; h != nil {
		p.vacated[h.index] = true
		if p.lowest != nil {
			p.lowest[h.index] = math.MinInt
		}
		p.changed(h)
	}
	p.result.Plan.Stop = append(p.result.Plan.Stop, &cluster.AllocStop{
		AllocID: a.ID, DesiredStatus: cluster.AllocDesiredEvict, DesiredDescription: descPreempted + by, PreemptedBy: by,
	})
	told := &cluster.PreemptedAlloc{ID: a.ID, Namespace: a.Namespace, JobID: a.JobID, TaskGroup: a.TaskGroup}
	if j := p.reader.JobVersion(nil, a.JobKey(), a.JobVersion); j != nil {
		told.JobType = j.Type
	}
	p.result.Annotations.PreemptedAllocs = append(p.result.Annotations.PreemptedAllocs, told)
}
