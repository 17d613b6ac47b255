package place

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// Descriptions of evaluations, in upstream's words where upstream has them.
const (
	DescQueued    = "created to place remaining allocations"
	DescDelayed   = "created for delayed rescheduling"
	DescStopFirst = "created to place allocations once those they replace have ended"
	DescNewerEval = "cancelled: a newer evaluation of the job was processed"
	DescPaused    = "replacements are paused: " // and the hold's reason
	DescAwaited   = "created to give up allocations that stay unknown"
)

// followupWindow puts replacements that are due close together into one
// follow-up evaluation.
const followupWindow = 5 * time.Second

// Reader is what placement reads; *cluster.Snapshot is one. Its watch sets are
// always nil. Equal versions mean equal records, in whatever snapshots.
type Reader interface {
	Index(ws cluster.WatchSet, tables ...string) uint64
	Nodes(ws cluster.WatchSet, prefix string) []*cluster.Node
	AllocsHolding(ws cluster.WatchSet, nodeID string) []*cluster.Allocation
	AllocsByJob(ws cluster.WatchSet, k cluster.JobKey) []*cluster.Allocation
	Job(ws cluster.WatchSet, k cluster.JobKey) *cluster.Job
	JobVersion(ws cluster.WatchSet, k cluster.JobKey, version uint64) *cluster.Job
	LatestDeployment(ws cluster.WatchSet, k cluster.JobKey) *cluster.Deployment
	Eval(ws cluster.WatchSet, id string) *cluster.Evaluation
	OpenEvalsByJob(k cluster.JobKey) []*cluster.Evaluation
	Claims() []*cluster.Evaluation // those that are open and have some
	RunLimited() bool              // whether any job declares a run time
	EvalsShortOfRoom(fn func(e *cluster.Evaluation) bool)
	SchedulerConfig(ws cluster.WatchSet) *cluster.SchedulerConfiguration
	FleetHold(ws cluster.WatchSet) *cluster.FleetHold
	NodesVersion() any
	AllocsVersion() any
	HoldingVersions(fn func(nodeID string, version any)) // by ID
	Usage(ws cluster.WatchSet, namespace string) *cluster.Usage
	Allowance(namespace string, usage func(namespace string) *cluster.Usage) *cluster.Allowance
	Borrowed(namespace string) []cluster.Borrowed
	ParallelChildren(child *cluster.Job) (limit, running int)
}

// View is a snapshot made ready for placement. Plans made from one view know of
// each other's placements, so several jobs can be planned on one snapshot
// without meeting on a node. It is not safe for concurrent use.
type View struct {
	*Cache
	number uint64 // of the Cache's views, from 1: what is kept must not hold on to a view, and so to its snapshot
	reader Reader
	config *cluster.SchedulerConfiguration
	freeze *cluster.FleetHold // nil: what is on silent nodes is replaced
	index  uint64

	tenants tenants

	standings []*standing         // the claims of all evaluations
	reserves  reserves            // … and reservations
	lowest    []int               // see lowestRanks
	movers    int                 // allocations that may be moved, once lowest is known
	settled   map[settlement]bool // for which consolidation was tried in vain
	evictions map[string]bool     // IDs of what plans of this view preempt
	stopping  map[string]bool     // … of what they stop
	updated   map[string]bool     // … and of what they update in place
}

// NewView prepares a snapshot that nothing is known of yet.
func NewView(r Reader) *View { return new(Cache).View(r) }

// Input is one question to placement.
type Input struct {
	// Job is the job as it should be, not necessarily as the snapshot has it; nil
	// when it was purged: then all its allocations stop.
	Job *cluster.Job
	// Eval is the evaluation to answer. It need not be in the snapshot.
	Eval *cluster.Evaluation
	Now  cluster.Time
	// NewID gives IDs for allocations, deployments and evaluations.
	NewID func() string
	// MaxBytes bounds a plan's encoded size, roughly; 0 does not. What is bigger is cut into
	// plans of that size, MaxParts at most (0: one); if that does not reach either, the last
	// one says More. Jobs that are placed all at once are never cut.
	MaxBytes, MaxParts int
}

// Result is placement's answer.
type Result struct {
	// Plan is never nil. Its Evals hold the answered evaluation and those that
	// follow from it; they are empty when More is set.
	Plan *cluster.Plan
	// Earlier are the parts of a big change that are to be committed before Plan, each when
	// the one before it was applied whole; after one that was not, ask again.
	Earlier []*cluster.Plan
	// Failed says for each group that lacks allocations why.
	Failed map[string]*cluster.AllocMetric
	// Queued counts for each group the allocations that it still lacks.
	Queued map[string]int
	// Annotations counts for each group what the plan does.
	Annotations *cluster.PlanAnnotations
	// Eval is the answered evaluation as the plan leaves it.
	Eval *cluster.Evaluation
	// More says that the plan was cut at MaxBytes: commit it and ask again.
	More bool
}

// Parts are the plans of the answer, in the order in which they are to be committed.
func (r *Result) Parts() []*cluster.Plan { return slices.Concat(r.Earlier, []*cluster.Plan{r.Plan}) }

// Empty says whether the plan changes neither allocations nor deployments.
func (r *Result) Empty() bool {
	p := r.Plan
	return len(r.Earlier) == 0 && len(p.Place) == 0 && len(p.Stop) == 0 && p.Deployment == nil && len(p.DeploymentUpdates) == 0
}

// planner makes one plan.
type planner struct {
	*View
	in         Input
	job        *cluster.Job
	allocs     []*cluster.Allocation
	groups     []*group
	deployment *cluster.Deployment // of the job's version: active, paused or failed; nil when none or done
	trials     map[string]bool     // groups with canaries that are not promoted
	deferred   bool                // something waits for the allocation it replaces to end
	paused     bool                // something would be replaced but for the hold on replacements
	requeued   bool                // something that was preempted, or a gang, waits for its own end
	held       map[string]*cluster.Claim
	claims     []*cluster.Claim // that the job has after this plan
	missed     []missing
	onJob      tallies // live allocations of the job
	onGroup    map[string]tallies
	censuses   []*census
	moved      []move // not counted there yet
	left       int    // bytes that the plan may still grow by
	bounded    bool
	quota      string // that keeps something waiting, "" for none
	waits      string // why nothing of the job may begin, "" when it may
	followups  []*cluster.Evaluation
	result     *Result
}

// Plan answers one evaluation. What it places counts as in use for later plans
// of the same view.
func (v *View) Plan(in Input) *Result { return v.answer(in).result }

// answer is Plan, with all that the plan was made of.
func (v *View) answer(in Input) *planner {
	v.reserve(in.Now)
	p := v.newPlanner(in)
	p.bind(in)
	p.held = p.heldClaims()
	p.oldDeployment()
	groups := p.reconcile()
	p.groups = groups
	p.waits = p.mayBegin()
	p.newDeployment(groups)
	for _, g := range groups {
		p.planGroup(g)
		p.result.Annotations.DesiredTGUpdates[g.name] = &g.counts
	}
	p.makeRoom()
	if in.Job != nil && in.Job.AllAtOnce && len(p.result.Failed) > 0 {
		p.placeNothing()
	}
	p.begins()
	p.finish()
	p.reserveNext()
	return p
}

// newPlanner gives a planner that knows what the job has.
func (v *View) newPlanner(in Input) *planner {
	p := &planner{
		View: v, in: in, job: in.Job, allocs: v.reader.AllocsByJob(nil, in.Eval.JobKey()),
		onGroup: map[string]tallies{}, trials: map[string]bool{},
		bounded: in.MaxBytes > 0 && (in.Job == nil || !in.Job.AllAtOnce),
		result: &Result{
			Failed: map[string]*cluster.AllocMetric{}, Queued: map[string]int{},
			Annotations: &cluster.PlanAnnotations{DesiredTGUpdates: map[string]*cluster.DesiredUpdates{}},
		},
	}
	p.newPart()
	for _, a := range p.allocs {
		if !a.Terminal() {
			p.count(a, 1)
		}
	}
	return p
}

// newPart begins a plan.
func (p *planner) newPart() {
	key := p.in.Eval.JobKey()
	plan := &cluster.Plan{EvalID: p.in.Eval.ID, EvalEpoch: p.in.Eval.ModifyIndex, Namespace: key.Namespace, JobID: key.ID}
	if p.job != nil {
		plan.JobVersion, plan.JobModifyIndex, plan.AllAtOnce = p.job.Version, p.job.JobModifyIndex, p.job.AllAtOnce
	}
	p.result.Plan, p.left = plan, p.in.MaxBytes
}

// count keeps how many live allocations the job has on each node.
func (p *planner) count(a *cluster.Allocation, by int) {
	if h := p.byID[a.NodeID]; h != nil { // else its node is gone
		p.moved = append(p.moved, move{h.index, a.TaskGroup, int32(by)})
	}
}

// move is a change of what the job has on a host.
type move struct {
	host  int
	group string
	by    int32
}

// tally brings the counts up to date, for whoever is going to read them.
func (p *planner) tally() {
	for _, m := range p.moved {
		if p.onJob == nil {
			p.onJob = make(tallies, len(p.hosts))
		}
		if p.onGroup[m.group] == nil {
			p.onGroup[m.group] = make(tallies, len(p.hosts))
		}
		p.onJob[m.host] += m.by
		p.onGroup[m.group][m.host] += m.by
		for _, c := range p.censuses {
			if c.group == "" || c.group == m.group {
				c.count(m.host, m.by)
			}
		}
	}
	p.moved = p.moved[:0]
}

// oldDeployment ends the deployment of an older version, or of a stopped job,
// and finds the one of the current version.
func (p *planner) oldDeployment() {
	d := p.reader.LatestDeployment(nil, p.in.Eval.JobKey())
	if d == nil {
		return
	}
	end := func(description string) {
		if d.Active() {
			p.result.Plan.DeploymentUpdates = append(p.result.Plan.DeploymentUpdates, &cluster.DeploymentStatusUpdate{
				DeploymentID: d.ID, Status: cluster.DeploymentCancelled, StatusDescription: description,
			})
		}
	}
	switch {
	case p.job == nil || p.job.Stop:
		end(cluster.DeploymentDescStoppedJob)
	case d.JobVersion != p.job.Version || d.JobCreateIndex != p.job.CreateIndex:
		end(cluster.DeploymentDescNewerJob)
	case d.Active() || d.Status == cluster.DeploymentFailed:
		p.deployment = d
	}
}

// rolls says whether a group's changes go by a deployment.
func rolls(g *group) bool {
	return g.spec != nil && g.spec.Update != nil && g.spec.Update.MaxParallel > 0 && g.spec.Count > 0
}

// newDeployment creates the deployment of a version that has none and something
// to roll out.
func (p *planner) newDeployment(groups []*group) {
	if p.deployment != nil || p.job == nil || p.job.Stop || p.job.Type != cluster.JobTypeService {
		return
	}
	states := map[string]*cluster.DeploymentState{}
	for _, g := range groups {
		if rolls(g) && (!g.touched || len(g.destroy)+len(g.inPlace) > 0) {
			states[g.name] = &cluster.DeploymentState{
				DesiredTotal: g.spec.Count, ProgressDeadline: g.spec.Update.ProgressDeadline, AutoRevert: g.spec.Update.AutoRevert,
				DesiredCanaries: g.trial, AutoPromote: g.trial > 0 && g.spec.Update.AutoPromote,
			}
		}
	}
	if len(states) == 0 {
		return
	}
	p.deployment = &cluster.Deployment{
		ID: p.in.NewID(), Namespace: p.job.Namespace, JobID: p.job.ID,
		JobVersion: p.job.Version, JobModifyIndex: p.job.ModifyIndex, JobSpecModifyIndex: p.job.JobModifyIndex,
		JobCreateIndex: p.job.CreateIndex, TaskGroups: states,
		Status: cluster.DeploymentRunning,
	}
	p.deployment.StatusDescription = p.deployment.RunningDescription()
	p.result.Plan.Deployment = p.deployment
}

// deploymentOf is the ID of the active deployment that a group's placements
// belong to, "" for none.
func (p *planner) deploymentOf(g *group) string {
	if p.deployment == nil || !p.deployment.Active() || p.deployment.TaskGroups[g.name] == nil {
		return ""
	}
	return p.deployment.ID
}

// parallel says how many allocations of the group may be replaced now: the
// update block's max_parallel less those whose health is not known yet. None
// while one is unhealthy, or canaries wait for their promotion.
func (p *planner) parallel(g *group) int {
	if g.trial > 0 {
		return 0
	}
	if !rolls(g) || p.job.Type != cluster.JobTypeService {
		return len(g.destroy)
	}
	if p.halted() {
		return 0
	}
	limit := g.spec.Update.MaxParallel - len(g.wants)
	for _, a := range g.kept {
		if p.deployment == nil || a.DeploymentID != p.deployment.ID {
			continue
		}
		switch s := a.DeploymentStatus; {
		case s == nil || s.Healthy == nil:
			limit--
		case !*s.Healthy:
			return 0
		}
	}
	return max(limit, 0)
}

// planGroup writes one group's changes into the plan.
func (p *planner) planGroup(g *group) {
	for _, s := range g.stops {
		if p.full() {
			break
		}
		p.stop(s.alloc, s.order)
	}
	if g.spec == nil {
		return
	}
	for _, a := range g.inPlace {
		p.updateInPlace(g, a)
	}
	p.putOff(g)
	p.await(g)
	g.ask = asks(p.job, g.spec)
	if p.job.PerNode() {
		p.planSystem(g)
		return
	}
	slices.SortStableFunc(g.destroy, func(a, b *cluster.Allocation) int { return nameIndex(a.Name) - nameIndex(b.Name) })
	limit := min(p.parallel(g), len(g.destroy))
	g.counts.DestructiveUpdate += uint64(limit)
	g.counts.Ignore += uint64(len(g.destroy) - limit)
	for _, w := range g.wants {
		switch {
		case w.canary:
			g.counts.Canary++
		case !w.moves: // counted as a migration
			g.counts.Place++
		}
	}
	for _, a := range g.destroy[:limit] {
		g.wants = append(g.wants, want{name: a.Name, prev: a, stop: descUpdating})
	}
	p.result.Queued[g.name] = 0
	if len(g.wants) == 0 {
		return
	}
	if g.spec.Gang != nil {
		p.placeGang(g, p.newSearch(p.job, g.spec))
		return
	}
	searches := map[uint64]*search{}
	for _, w := range g.wants {
		if p.waits != "" || p.full() {
			p.result.Queued[g.name]++
			continue
		}
		if w.prev != nil && evicted(w.prev) && p.ends(w.prev) { // its last checkpoint is yet to come
			p.result.Queued[g.name]++
			p.requeued = true
			if c := p.held[w.name]; c != nil && p.versionOf(g, w) == p.job {
				p.claims = append(p.claims, c) // it was moved
			}
			continue
		}
		of := p.versionOf(g, w)
		if searches[of.Version] == nil {
			searches[of.Version] = p.newSearch(of, of.Group(g.name))
		}
		nodes := searches[of.Version]
		if c := p.held[w.name]; c != nil && of == p.job {
			if p.waiting(c) {
				p.result.Queued[g.name]++
				p.claims = append(p.claims, c)
				continue
			}
			if a := p.redeem(g, nodes, c); a != nil {
				if w.stop != "" {
					p.vacate(w.prev, -1)
				}
				p.settle(g, p.job, w, a)
				continue
			}
		}
		p.place(g, of, nodes, w)
	}
}

// full says whether nothing more goes into the plan; then More is set. One that has reached
// its size is followed by another, as long as there may be more.
func (p *planner) full() bool {
	switch r := p.result; {
	case !p.bounded || p.left > 0 || r.More:
	case len(r.Earlier)+1 < p.in.MaxParts:
		r.Earlier = append(r.Earlier, r.Plan)
		p.newPart()
	default:
		r.More = true
	}
	return p.result.More
}

// Sizes of parts of an encoded plan, in bytes, as far as they are the same for all.
const (
	stopBytes  = 250
	placeBytes = 400
)

// stop adds the stop of an allocation, which from now on leaves its place.
func (p *planner) stop(a *cluster.Allocation, order *cluster.AllocStop) {
	p.left -= stopBytes
	p.order(a, order)
	p.vacate(a, -1)
}

// order adds the stop of an allocation.
func (p *planner) order(a *cluster.Allocation, s *cluster.AllocStop) {
	p.stopping[s.AllocID] = true
	p.disturb(a)
	p.result.Plan.Stop = append(p.result.Plan.Stop, s)
}

// vacate counts an allocation out (-1), or in again (1), if it lives.
func (p *planner) vacate(a *cluster.Allocation, by int) {
	if !a.Terminal() {
		p.count(a, by)
	}
}

func (p *planner) add(a *cluster.Allocation) {
	if p.bounded {
		p.left -= placeBytes + len(cluster.Marshal(a.AllocatedResources)) + len(cluster.Marshal(a.Metrics))
	}
	if a.CreateIndex > 0 {
		p.updated[a.ID] = true
		p.disturb(a)
	}
	p.result.Plan.Place = append(p.result.Plan.Place, a)
}

// updateInPlace moves a running allocation to the job's version.
func (p *planner) updateInPlace(g *group, old *cluster.Allocation) {
	if p.full() {
		return
	}
	g.counts.InPlaceUpdate++
	a := *old.Whole()
	a.EvalID, a.JobVersion, a.JobCreateIndex = p.in.Eval.ID, p.job.Version, p.job.CreateIndex
	a.TaskStates = nil // the node's side: the state keeps its own
	if id := p.deploymentOf(g); a.DeploymentID != id {
		a.DeploymentID, a.DeploymentStatus = id, nil
	}
	p.add(&a)
}

// putOff gives failed allocations that must wait their follow-up evaluations.
func (p *planner) putOff(g *group) {
	p.followUp(g.later, cluster.TriggerAllocFailure, DescDelayed, func(l later, id string) {
		p.result.Plan.Stop = append(p.result.Plan.Stop, &cluster.AllocStop{AllocID: l.alloc.ID, FollowupEvalID: id})
	})
}

// await marks what is on silent nodes unknown, with an evaluation for when it is
// given up.
func (p *planner) await(g *group) {
	orders := map[string]*cluster.AllocStop{}
	for _, l := range g.awaited {
		if l.alloc.ClientStatus == cluster.AllocClientUnknown {
			continue
		}
		o := &cluster.AllocStop{AllocID: l.alloc.ID, ClientStatus: cluster.AllocClientUnknown}
		orders[l.alloc.ID] = o
		p.result.Plan.Stop = append(p.result.Plan.Stop, o)
	}
	timed := slices.DeleteFunc(slices.Clone(g.awaited), func(l later) bool { return l.at == 0 })
	p.followUp(timed, cluster.TriggerMaxDisconnect, DescAwaited, func(l later, id string) {
		o := orders[l.alloc.ID]
		if o == nil {
			o = &cluster.AllocStop{AllocID: l.alloc.ID}
			p.result.Plan.Stop = append(p.result.Plan.Stop, o)
		}
		o.FollowupEvalID = id
	})
}

// followUp makes evaluations for allocations that wait for a time, those that are
// due close together in one, and leaves out what has one already.
func (p *planner) followUp(list []later, trigger, description string, set func(l later, evalID string)) {
	slices.SortFunc(list, func(a, b later) int {
		return cmp.Or(cmp.Compare(a.at, b.at), cmp.Compare(nameIndex(a.alloc.Name), nameIndex(b.alloc.Name)), cmp.Compare(a.alloc.ID, b.alloc.ID))
	})
	var current *cluster.Evaluation
	var until cluster.Time
	for _, l := range list {
		if e := p.reader.Eval(nil, l.alloc.FollowupEvalID); e != nil && !e.Terminal() && e.ID != p.in.Eval.ID {
			continue // its turn will come
		}
		if current == nil || l.at > until {
			current, until = p.newEval(trigger, description), l.at.Add(followupWindow)
			current.Status = cluster.EvalStatusPending
			p.followups = append(p.followups, current)
		}
		current.WaitUntil = l.at
		set(l, current.ID)
	}
}

// place finds a node for one allocation of a version of the job, or says why there is none.
func (p *planner) place(g *group, of *cluster.Job, nodes *search, w want) {
	if w.stop != "" {
		p.vacate(w.prev, -1) // it leaves its place to the new one
	}
	if e := p.excess(g.ask); e != nil {
		p.holdBack(g, nodes, w, e)
		return
	}
	var avoid []string
	if w.rescheduled != nil {
		for _, e := range append(events(w.prev), w.rescheduled) {
			avoid = append(avoid, e.PrevNodeID)
		}
	}
	p.tally()
	h, metric := nodes.best(avoid, p.onJob, p.onGroup[g.name])
	if h == nil {
		p.fail(g, nodes, w, metric)
		return
	}
	p.seat(g, of, nodes, w, h, metric)
}

// seat places an allocation of a version of the job on a host that can take it, if the quota
// leaves room for it.
func (p *planner) seat(g *group, of *cluster.Job, nodes *search, w want, h *host, metric *cluster.AllocMetric) {
	a, e := p.occupy(g, nodes, h, metric)
	if e != nil {
		p.holdBack(g, nodes, w, e)
		return
	}
	p.settle(g, of, w, a)
}

// occupy gives an allocation to be its place, unless the quota leaves no room for it. It
// has no name yet.
func (p *planner) occupy(g *group, nodes *search, h *host, metric *cluster.AllocMetric) (*cluster.Allocation, *excess) {
	id := p.in.NewID()
	resources, err := nodes.demand.take(h, id, nodes.mix)
	if err != nil {
		panic(err) // best judged the same demand on the same use: a bug
	}
	if e := p.excess(cluster.NewUsage(p.job.Namespace, resources, p.job.Preemptible())); e != nil { // now that its devices are known
		return nil, e
	}
	return p.put(g, h, id, resources, metric), nil
}

// put counts an allocation to be on its host.
func (p *planner) put(g *group, h *host, id string, resources *cluster.AllocatedResources, metric *cluster.AllocMetric) *cluster.Allocation {
	a := &cluster.Allocation{
		ID: id, Namespace: p.job.Namespace, EvalID: p.in.Eval.ID,
		NodeID: h.node.ID, NodeName: h.node.Name,
		JobID: p.job.ID, JobCreateIndex: p.job.CreateIndex, TaskGroup: g.name,
		AllocatedResources: resources, Metrics: metric,
		DesiredStatus: cluster.AllocDesiredRun, ClientStatus: cluster.AllocClientPending,
		CreateTime: int64(p.in.Now), ModifyTime: int64(p.in.Now),
	}
	p.plan(h, a)
	p.count(a, 1)
	p.charge(a, 1)
	return a
}

// leave takes back an allocation to be.
func (p *planner) leave(a *cluster.Allocation) {
	p.unplan(p.byID[a.NodeID], a)
	p.count(a, -1)
	p.charge(a, -1)
}

// settle makes an allocation that has its place the one that was wanted, of a version of the job.
func (p *planner) settle(g *group, of *cluster.Job, w want, a *cluster.Allocation) {
	a.Name, a.JobVersion = w.name, of.Version
	if of == p.job {
		a.DeploymentID = p.deploymentOf(g)
	}
	if w.canary || w.prev != nil && w.prev.Canary() {
		a.DeploymentStatus = &cluster.AllocDeploymentStatus{Canary: true}
	}
	if w.prev != nil {
		a.PreviousAllocation, a.Checkpoints = w.prev.ID, w.prev.Checkpoints
		if w.stop != descUpdating && w.prev.DesiredDescription != descUpdating {
			a.RescheduleTracker = track(w.prev, w.rescheduled, p.in.Now)
		}
	}
	if w.stop != "" {
		p.left -= stopBytes
		p.order(w.prev, stopOf(w.prev, w.stop))
	}
	p.add(a)
}

// fail notes that a want found no node.
func (p *planner) fail(g *group, nodes *search, w want, metric *cluster.AllocMetric) {
	if !p.stopsFirst(g, nodes, w) {
		p.miss(g, nodes, []want{w}, metric)
	}
}

// stopsFirst says whether what a want without a node would replace is just that which is in
// the way: a device, a port or the last memory of a node. Then it is stopped first and the
// want waits until it has ended; else it stays.
func (p *planner) stopsFirst(g *group, nodes *search, w want) bool {
	p.result.Queued[g.name]++
	if w.prev != nil && !w.prev.ClientTerminal() {
		if h := p.byID[w.prev.NodeID]; h != nil && h.node.Ready() && p.fitsWithout(g, nodes, h, w.prev.ID) {
			p.deferred = true
			if w.stop != "" {
				p.left -= stopBytes
				p.order(w.prev, stopOf(w.prev, w.stop))
			}
			return true
		}
	}
	if w.stop != "" {
		p.vacate(w.prev, 1)
	}
	return false
}

// placeNothing takes all new placements back, with the stops that belong to
// them: the job wants all of its allocations or none.
func (p *planner) placeNothing() {
	plan := p.result.Plan
	replaced := map[string]bool{}
	kept := plan.Place[:0:0]
	for _, a := range plan.Place {
		if !slices.Contains(p.byID[a.NodeID].planned, a) { // updated in place
			kept = append(kept, a)
			continue
		}
		p.leave(a)
		p.result.Queued[a.TaskGroup]++
		replaced[a.PreviousAllocation] = true
	}
	plan.Place = kept
	plan.Stop = slices.DeleteFunc(plan.Stop, func(s *cluster.AllocStop) bool {
		return replaced[s.AllocID] && (s.DesiredDescription == descUpdating || s.DesiredDescription == descRescheduled)
	})
}

func (p *planner) newEval(trigger, description string) *cluster.Evaluation {
	from := p.in.Eval
	return &cluster.Evaluation{
		ID: p.in.NewID(), Namespace: from.Namespace, Priority: from.Priority, Type: from.Type,
		TriggeredBy: trigger, JobID: from.JobID, JobModifyIndex: from.JobModifyIndex,
		StatusDescription: description, PreviousEval: from.ID, SnapshotIndex: p.index,
		CreateTime: int64(p.in.Now), ModifyTime: int64(p.in.Now),
	}
}

// finish writes the answer: the evaluation is complete, or stays blocked when it
// was and still lacks something; a first failure leaves a blocked evaluation
// behind. Older blocked ones of the job are cancelled: there is one at most. Other
// pending ones are answered by the same plan, unless theirs would have a higher priority.
func (p *planner) finish() {
	r := p.result
	e := *p.in.Eval
	e.SnapshotIndex, e.QueuedAllocations, e.PlanAnnotations = p.index, maps.Clone(r.Queued), r.Annotations
	e.FailedTGAllocs, e.QuotaLimitReached = nil, ""
	if len(r.Failed) > 0 {
		e.FailedTGAllocs = r.Failed
	}
	if p.deployment != nil {
		e.DeploymentID = p.deployment.ID
	}
	e.Status, e.StatusDescription, e.Claims = cluster.EvalStatusComplete, "", nil
	evals := []*cluster.Evaluation{&e}
	blocked := &e
	trigger, description := cluster.TriggerQueuedAllocs, DescQueued
	switch {
	case p.waits != "" && p.lacks():
		description = p.waits
		e.StatusDescription = description
	case p.paused:
		description = DescPaused + p.freeze.Reason
		e.StatusDescription = description
	case p.deferred:
		trigger, description = cluster.TriggerRollingUpdate, DescStopFirst
	case len(p.claims) > 0:
		description = DescClaims
	case p.requeued && len(r.Failed) == 0:
		description = DescRequeued
	}
	switch {
	case len(r.Failed) == 0 && !p.deferred && !p.paused && !p.requeued && len(p.claims) == 0 && (p.waits == "" || !p.lacks()):
	case p.in.Eval.Status == cluster.EvalStatusBlocked:
		e.Status, e.StatusDescription, e.Claims = cluster.EvalStatusBlocked, description, p.claims
	default:
		blocked = p.newEval(trigger, description)
		blocked.Status, blocked.FailedTGAllocs = cluster.EvalStatusBlocked, e.FailedTGAllocs
		blocked.QueuedAllocations, blocked.Claims = e.QueuedAllocations, p.claims
		e.BlockedEval = blocked.ID
		evals = append(evals, blocked)
	}
	if blocked.Status == cluster.EvalStatusBlocked {
		blocked.QuotaLimitReached = p.quota
	}
	r.Eval = &e
	if r.More {
		return
	}
	p.stand(e.JobKey(), e.Priority, p.claims)
	for _, other := range p.reader.OpenEvalsByJob(e.JobKey()) {
		switch {
		case other.ID == e.ID:
		case other.Status == cluster.EvalStatusBlocked:
			c := *other
			c.Status, c.StatusDescription = cluster.EvalStatusCanceled, DescNewerEval
			evals = append(evals, &c)
		case other.Answerable() && other.Priority <= e.Priority && len(r.Plan.Answers) < cluster.MaxAnswered:
			r.Plan.Answers = append(r.Plan.Answers, other.ID)
		}
	}
	r.Plan.Evals = append(evals, p.followups...)
}
