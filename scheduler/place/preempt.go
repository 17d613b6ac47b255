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

// attempt is one kind of work for which preemption was tried in vain: it is as vain for all other work of the kind, as
// long as this view knows of nothing more that leaves.
type attempt struct {
	of       *candidates
	priority int
	owed     bool
	leaving  int
}

func (p *planner) attemptOf(m missing) attempt {
	return attempt{m.nodes.candidates, p.job.Priority, p.owed(m.group, len(m.wants)), len(p.evictions) + len(p.stopping)}
}

// isVain says whether what is missing has been tried for other work, and when the first would be free to be preempted
// that is not yet. A job that has something already may gain by its own changes.
func (p *planner) isVain(m missing) (until cluster.Time, vain bool) {
	if len(p.allocs) == 0 {
		until, vain = p.vain[p.attemptOf(m)]
	}
	return until, vain
}

// wasVain notes that not even one could be placed, unless that may be due to what only this job asks for.
func (p *planner) wasVain(m missing, t *trial) {
	gang := m.group.spec.Gang
	if len(t.claims) == 0 && len(p.claims) == 0 && len(m.nodes.limits) == 0 && (gang == nil || !gang.Required) {
		p.vain[p.attemptOf(m)] = t.protected
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
		c.priority = max(c.priority, u.priority)
		if !u.borrowed {
			c.owned++
		}
		c.lost, c.devices, c.n = c.lost+u.lost, c.devices+u.devices, c.n+len(u.members)
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
	victims   bool // others may be preempted
	ease      ease // what is overlooked, to find out what stands in the way
	owed      bool // … of the same priority, if they run on what they have borrowed
	hosts     map[int]*host
	claims    []*cluster.Claim
	counted   []*cluster.Allocation
	gone      map[string]bool // IDs of what it preempts
	units     []*unit         // … as units
	protected cluster.Time    // when the first would be free to be preempted that is not yet; 0: none
}

func (p *planner) newTrial(g *group, nodes *search, victims bool) *trial {
	return &trial{planner: p, group: g, nodes: nodes, victims: victims, hosts: map[int]*host{}, gone: map[string]bool{}}
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
		if one.protected != 0 && (t.protected == 0 || one.protected < t.protected) {
			t.protected = one.protected
		}
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
	t.spare()
	return true
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
	for i := range t.nodes.list {
		k := &t.nodes.list[i]
		h := k.host
		if t.nodes.outside(h.index) || t.nodes.refusal(h.index, t.onJob.on(h.index), t.onGroup[t.group.name].on(h.index)) != admitted {
			continue
		}
		if k.exhausted != "" && t.hopeless(h) {
			continue
		}
		th := t.host(h)
		var leave []*unit
		if t.nodes.demand.exhausted(th) != "" {
			if leave = t.cheapest(th); leave == nil {
				continue
			}
		}
		c := costOf(leave)
		if at != nil && c.compare(price) > 0 {
			continue
		}
		judged := candidate{host: th, affinity: k.affinity}
		t.nodes.candidates.rate(&judged)
		n, tied := int64(judged.sum/max(judged.applied, 1)), mix(t.nodes.seed^k.host.hash)
		if at == nil || c.compare(price) < 0 || n > norm || n == norm && tied < tie {
			at, units, price, norm, tie = h, leave, c, n, tied
		}
	}
	if at == nil {
		return false
	}
	for _, u := range units {
		t.units = append(t.units, u)
		for _, a := range u.members {
			t.gone[a.ID] = true
			if h := t.byID[a.NodeID]; h != nil {
				delete(t.hosts, h.index)
			}
		}
	}
	th := t.host(at)
	id := t.in.NewID()
	r, err := t.nodes.demand.take(th, id, t.nodes.mix)
	if err != nil {
		return false
	}
	a := &cluster.Allocation{ID: id, NodeID: at.node.ID, TaskGroup: t.group.name, AllocatedResources: r}
	th.use.Add(a)
	th.roomAt, th.fragments = 0, fragments{}
	t.count(a, 1)
	t.counted = append(t.counted, a)
	t.claims = append(t.claims, &cluster.Claim{
		AllocID: id, Name: w.name, TaskGroup: t.group.name, JobVersion: t.job.Version, NodeID: at.node.ID, Resources: r,
	})
	return true
}

// quarry is what may come of preemption on a host, whoever preempts.
type quarry struct {
	lowest  int  // the lowest priority that holds something
	reclaim bool // something may be taken back from its namespace
	ending  bool // something leaves in any case
	held    []occupant
}

// occupant is an allocation that holds something of a host, with its version of the job, nil when that is gone.
type occupant struct {
	*cluster.Allocation
	job *cluster.Job
}

// quarryOf looks at a host, once in a view.
func (v *View) quarryOf(h *host) *quarry {
	q := v.quarries[h.index]
	if q != nil {
		return q
	}
	q = &quarry{lowest: math.MaxInt - PriorityGap}
	v.quarries[h.index] = q
	for _, a := range v.reader.AllocsHolding(nil, h.node.ID) {
		q.ending = q.ending || a.Terminal()
		job := v.reader.JobVersion(nil, a.JobKey(), a.JobVersion)
		q.held = append(q.held, occupant{a, job})
		if job != nil {
			q.lowest = min(q.lowest, job.Priority)
			g := job.Group(a.TaskGroup)
			q.reclaim = q.reclaim || g != nil && g.Preempt != nil && g.Preempt.Reclaim
		}
	}
	return q
}

// hopeless says that a host that is full for the demand will be full: nothing there leaves, and nothing there may be
// preempted by the job. It costs one look at each host in a view, where the whole answer costs adding up what is there.
func (t *trial) hopeless(h *host) bool {
	if t.ease != easeNothing {
		return false
	}
	q := t.quarryOf(h)
	if q.ending || t.victims && (q.lowest+PriorityGap <= t.job.Priority || q.reclaim && t.owed) {
		return false
	}
	if len(t.evictions)+len(t.stopping)+len(t.gone) == 0 {
		return true
	}
	return !slices.ContainsFunc(q.held, func(a occupant) bool { return t.over(a.Allocation) || t.gone[a.ID] })
}

// host gives a host as it will be.
func (t *trial) host(h *host) *host {
	th := t.hosts[h.index]
	if th == nil {
		th = h.with(t.future(h))
		t.hosts[h.index] = th
	}
	return th
}

// over says whether an allocation makes room without anything being done: it was preempted
// before, or is of this job and stops.
func (t *trial) over(a *cluster.Allocation) bool {
	return evicted(a) || t.evictions[a.ID] || a.JobKey() == t.in.Eval.JobKey() && (a.ServerTerminal() || t.stopping[a.ID])
}

// future adds up what will be in use on a host, the claims that bind included.
func (t *trial) future(h *host) *cluster.NodeUse {
	use := cluster.NewNodeUse(h.node)
	for _, a := range t.quarryOf(t.byID[h.node.ID]).held {
		if !t.over(a.Allocation) && !t.gone[a.ID] {
			use.Add(a.Allocation)
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

// cheapest chooses units that must leave a host for the demand to fit, none of which could
// stay; nil when it does not fit whatever leaves. Two orders are tried: the cheapest first,
// and, within a priority, the largest.
func (t *trial) cheapest(th *host) (best []*unit) {
	if !t.victims {
		return nil
	}
	units := t.prey(th)
	if len(units) == 0 {
		return nil
	}
	inOrder := func(order func(a, b *unit) int) {
		list := slices.Clone(units)
		slices.SortStableFunc(list, order)
		if chosen := t.enough(th, list); chosen != nil && (best == nil || costOf(chosen).compare(costOf(best)) < 0) {
			best = chosen
		}
	}
	inOrder(func(a, b *unit) int { return costOf([]*unit{a}).compare(costOf([]*unit{b})) })
	inOrder(func(a, b *unit) int {
		return cmp.Or(cmp.Compare(a.priority, b.priority), cmp.Compare(b.size, a.size), cmp.Compare(a.lost, b.lost))
	})
	return best
}

// enough takes units in their order until the demand fits, and then lets stay whoever can,
// the last first.
func (t *trial) enough(th *host, units []*unit) []*unit {
	var h *host
	without := func(gone []*unit) bool {
		for _, u := range gone {
			for _, a := range u.members {
				t.gone[a.ID] = true
			}
		}
		h = th.with(t.future(th))
		for _, u := range gone {
			for _, a := range u.members {
				delete(t.gone, a.ID)
			}
		}
		return t.nodes.demand.exhausted(h) == ""
	}
	for n := range units {
		if !without(units[:n+1]) {
			continue
		}
		chosen := slices.Clone(units[:n+1])
		for i := n - 1; i >= 0; i-- { // the last was needed
			if rest := slices.Delete(slices.Clone(chosen), i, i+1); without(rest) {
				chosen = rest
			}
		}
		return chosen
	}
	return nil
}

// prey are the units that may be preempted and hold something of the host.
func (t *trial) prey(h *host) (units []*unit) {
	gangs := map[string]bool{}
	for _, x := range t.quarryOf(t.byID[h.node.ID]).held {
		a, job := x.Allocation, x.job
		if t.over(a) || t.gone[a.ID] || t.stopping[a.ID] || a.Terminal() || a.JobKey() == t.in.Eval.JobKey() {
			continue
		}
		if job == nil || job.CreateIndex != a.JobCreateIndex || job.Group(a.TaskGroup) == nil || job.Priority > t.job.Priority && t.ease < easePriority {
			continue
		}
		members := []*cluster.Allocation{a}
		if g := job.Group(a.TaskGroup); g.Gang != nil {
			key := a.Namespace + "\x00" + a.JobID + "\x00" + a.TaskGroup
			if gangs[key] {
				continue
			}
			gangs[key] = true
			members = members[:0]
			for _, m := range t.reader.AllocsByJob(nil, a.JobKey()) {
				if m.TaskGroup == a.TaskGroup && m.JobVersion == a.JobVersion && m.JobCreateIndex == a.JobCreateIndex && !m.Terminal() && !t.evictions[m.ID] && !t.stopping[m.ID] {
					members = append(members, m)
				}
			}
		}
		if u := t.unitOf(h, job, members); u != nil {
			units = append(units, u)
		}
	}
	return units
}

// unitOf weighs members that are preempted together; nil when one of them may not be.
func (t *trial) unitOf(h *host, job *cluster.Job, members []*cluster.Allocation) *unit {
	u := &unit{members: members, priority: job.Priority, borrowed: true}
	for _, a := range members {
		if t.updated[a.ID] {
			return nil // this plan knows another version of it
		}
		kind, until := t.shield(a, job, t.owed)
		if kind == cluster.ObstacleMinRuntime && (t.protected == 0 || until < t.protected) {
			t.protected = until
		}
		if !t.ease.overlooks(kind) {
			return nil
		}
		u.borrowed = u.borrowed && t.onLoan(a)
		held := devicesOf(a)
		u.lost += t.lostOf(a) * max(held, 1)
		u.devices += held
		if a.NodeID == h.node.ID {
			u.size += held
		}
	}
	return u
}

// shield says what keeps an allocation of a version of a job from being preempted by this plan's job, "" for nothing;
// of a time, until when.
func (p *planner) shield(a *cluster.Allocation, job *cluster.Job, owed bool) (kind string, until cluster.Time) {
	policy := job.Group(a.TaskGroup).Preempt
	if policy == nil {
		policy = &cluster.PreemptPolicy{}
	}
	lower := job.Priority+PriorityGap <= p.job.Priority
	switch {
	case job.PerNode():
		return cluster.ObstacleSystem, 0
	case policy.Never:
		return cluster.ObstacleNever, 0
	case !lower && !(policy.Reclaim && p.onLoan(a) && owed):
		return cluster.ObstaclePriority, 0
	case policy.MinRuntime > 0:
		if free := beganAt(a).Add(policy.MinRuntime); free > p.in.Now {
			return cluster.ObstacleMinRuntime, free
		}
	}
	return "", 0
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

// lostOf is the work of an allocation, in seconds, since its last checkpoint or its start.
func (p *planner) lostOf(a *cluster.Allocation) int64 {
	saved := beganAt(a)
	for _, c := range a.Checkpoints {
		saved = max(saved, min(c.Time, p.in.Now))
	}
	return max(0, int64(p.in.Now-saved)/1e9)
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
	slices.SortStableFunc(t.units, func(a, b *unit) int { return costOf([]*unit{b}).compare(costOf([]*unit{a})) })
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
	p.result.Plan.Stop = append(p.result.Plan.Stop, &cluster.AllocStop{
		AllocID: a.ID, DesiredStatus: cluster.AllocDesiredEvict, DesiredDescription: descPreempted + by, PreemptedBy: by,
	})
	told := &cluster.PreemptedAlloc{ID: a.ID, Namespace: a.Namespace, JobID: a.JobID, TaskGroup: a.TaskGroup}
	if j := p.reader.JobVersion(nil, a.JobKey(), a.JobVersion); j != nil {
		told.JobType = j.Type
	}
	p.result.Annotations.PreemptedAllocs = append(p.result.Annotations.PreemptedAllocs, told)
}
