package place

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"github.com/rxvision/rxvision/cluster"
)

// Descriptions that allocations get with their desired status, in upstream's words.
const (
	descNotNeeded   = "alloc not needed due to job update"
	descUpdating    = "alloc is being updated due to job update"
	descMigrating   = "alloc is being migrated"
	descLost        = "alloc is lost since its node is down"
	descRescheduled = "alloc was rescheduled because it failed"
	descUnfit       = "alloc is being moved off an unhealthy device"
	descReconnected = "alloc not needed due to disconnected client reconnect"
	descGang        = "alloc is stopped since its gang starts anew"
	descGangFailed  = "alloc is stopped since its gang has failed"
)

// want is one allocation that the job lacks.
type want struct {
	name string
	prev *cluster.Allocation // what it takes the place of, nil for none
	stop string              // description with which prev is stopped once the placement is found, "" for not at all
	// rescheduled is the event to add to the tracker; its time comes with the placement.
	rescheduled *cluster.RescheduleEvent
	moves       bool  // it is counted as something else than a placement: prev was asked to leave its node, or its gang is updated
	away        bool  // prev is unknown
	canary      bool  // runs beside what has its name
	host        *host // of a system job: the node that lacks it
}

// ending is an allocation that stops whatever else the plan finds.
type ending struct {
	alloc *cluster.Allocation
	order *cluster.AllocStop
}

// later is a failed allocation whose replacement must wait.
type later struct {
	alloc *cluster.Allocation
	at    cluster.Time
}

// group is what one task group has and lacks.
type group struct {
	name    string
	spec    *cluster.TaskGroup // nil: the job has no such group (any more)
	ask     *cluster.Usage     // what each of its allocations holds at least
	counts  cluster.DesiredUpdates
	stops   []ending
	wants   []want
	inPlace []*cluster.Allocation
	destroy []*cluster.Allocation // run an older version that cannot be changed in place
	later   []later
	awaited []later               // unknown, or to be: given up at the time, 0: never
	kept    []*cluster.Allocation // those that count towards the group now
	touched bool                  // some allocation has run the job's version before
	held    bool                  // something is left out until the deployment goes on
	trial   int                   // canaries that run, or are to, beside the old version until they are promoted
	nodes   *search               // of a system job
}

// reconcile compares what each group of the job has with what it should have.
// Groups come in the job's order, those that the job no longer has at the end.
func (p *planner) reconcile() []*group {
	var groups []*group
	byName := map[string]*group{}
	add := func(name string, spec *cluster.TaskGroup) *group {
		g := &group{name: name, spec: spec}
		groups, byName[name] = append(groups, g), g
		return g
	}
	if p.job != nil && !p.job.Stop && !p.job.Spawns() { // else nothing of it is to run
		for _, spec := range p.job.TaskGroups {
			add(spec.Name, spec)
		}
	}
	allocs := map[*group][]*cluster.Allocation{}
	for _, a := range p.allocs {
		g := byName[a.TaskGroup]
		if g == nil {
			g = add(a.TaskGroup, nil)
		}
		allocs[g] = append(allocs[g], a)
	}
	for _, g := range groups {
		switch {
		case g.spec == nil:
			p.stopGroup(g, allocs[g])
		case p.job.PerNode():
			p.reconcileSystem(g, allocs[g])
		default:
			p.reconcileGroup(g, allocs[g])
		}
	}
	return groups
}

// stopGroup stops whatever lives.
func (p *planner) stopGroup(g *group, allocs []*cluster.Allocation) {
	for _, a := range allocs {
		switch {
		case a.ClientTerminal():
		case p.silent(a) && !p.spared(a):
			g.lose(a)
		case !a.ServerTerminal():
			g.counts.Stop++
			g.stop(a, descNotNeeded)
		}
	}
}

func stopOf(a *cluster.Allocation, description string) *cluster.AllocStop {
	return &cluster.AllocStop{AllocID: a.ID, DesiredStatus: cluster.AllocDesiredStop, DesiredDescription: description}
}

func (g *group) stop(a *cluster.Allocation, description string) {
	g.stops = append(g.stops, ending{a, stopOf(a, description)})
}

// lose stops an allocation whose node is gone. One that was asked to stop before
// keeps the reason.
func (g *group) lose(a *cluster.Allocation) {
	s := stopOf(a, descLost)
	if a.ServerTerminal() {
		s.DesiredStatus, s.DesiredDescription = a.DesiredStatus, a.DesiredDescription
	}
	s.ClientStatus = cluster.AllocClientLost
	g.stops = append(g.stops, ending{a, s})
}

// silent says whether the allocation's node is not heard of, or no longer known.
func (p *planner) silent(a *cluster.Allocation) bool {
	h := p.byID[a.NodeID]
	return h == nil || h.node.Silent()
}

// spared says whether the hold on replacements leaves alone what is on the
// allocation's silent node.
func (p *planner) spared(a *cluster.Allocation) bool {
	h := p.byID[a.NodeID]
	return p.freeze != nil && h != nil && h.node.Status == cluster.NodeStatusDisconnected
}

// state says what an allocation is to its group.
type state int

const (
	ignored state = iota // over, or replaced: it does not count
	done                 // batch work that ended well: holds its name
	running              // counts and may be updated
	held                 // counts; its node is silent, but replacements are paused
	failed               // may be replaced, by the reschedule policy
	lost                 // its node is gone
	moving               // asked to leave its node
	leaving              // asked to stop by an earlier plan, nothing took its place yet
	unheard              // its node is silent, or has not spoken of it yet; it may come back
)

func (p *planner) stateOf(a *cluster.Allocation) state {
	current := p.current(a)
	switch {
	case a.ServerTerminal():
		if a.NextAllocation == "" && a.JobCreateIndex == p.job.CreateIndex && (takesOver(a.DesiredDescription) || evicted(a)) {
			return leaving
		}
	case a.ClientStatus == cluster.AllocClientComplete:
		if p.job.Finite() && current && !p.startedAnew(a) {
			return done
		}
	case a.ClientStatus == cluster.AllocClientFailed:
		if a.NextAllocation == "" && (current || p.outlives(a)) {
			if p.brokenUnder(a) {
				return moving
			}
			return failed
		}
	case a.ClientTerminal():
	case p.silent(a):
		return p.stateAway(a)
	case a.ClientStatus == cluster.AllocClientUnknown:
		return unheard // its node is back and will tell
	case set(a.DesiredTransition.Migrate), p.onUnfit(a):
		return moving
	case set(a.DesiredTransition.Reschedule), set(a.DesiredTransition.ForceReschedule), current && p.unhealthy(a):
		return failed
	default:
		return running
	}
	return ignored
}

// stateAway says what an allocation on a silent node is to its group.
func (p *planner) stateAway(a *cluster.Allocation) state {
	g := p.job.Group(a.TaskGroup)
	switch {
	case p.spared(a):
		return held
	case p.byID[a.NodeID] == nil, g.Disconnect == nil, set(a.DesiredTransition.Migrate):
		return lost // with nobody to wait for it, or told to go
	case g.Disconnect.Replace && a.ClientStatus == cluster.AllocClientPending:
		return lost // it never ran
	}
	if due := givenUp(g.Disconnect, a, p.in.Now); due != 0 && due <= p.in.Now {
		return lost
	}
	return unheard
}

// givenUp is when an allocation on a silent node counts as lost, 0 for never.
func givenUp(d *cluster.DisconnectStrategy, a *cluster.Allocation, now cluster.Time) cluster.Time {
	switch {
	case d.LostAfter == 0:
		return 0
	case a.UnknownSince == 0:
		return now.Add(d.LostAfter)
	}
	return a.UnknownSince.Add(d.LostAfter)
}

// takesOver says whether a stop with this description leaves a gap that a new
// allocation fills.
func takesOver(description string) bool {
	switch description {
	case descUpdating, descMigrating, descRescheduled, descLost, descGang, descUnfit:
		return true
	}
	return false
}

func set(b *bool) bool { return b != nil && *b }

// current says whether the allocation is of the job's current version.
func (p *planner) current(a *cluster.Allocation) bool {
	return a.JobVersion == p.job.Version && a.JobCreateIndex == p.job.CreateIndex
}

// unhealthy says whether the running deployment has found the allocation unhealthy.
func (p *planner) unhealthy(a *cluster.Allocation) bool {
	return p.deployment != nil && p.deployment.Active() && a.DeploymentID == p.deployment.ID &&
		a.DeploymentStatus != nil && a.DeploymentStatus.Healthy != nil && !*a.DeploymentStatus.Healthy
}

// named is an allocation that holds, or held, a name of its group.
type named struct {
	*cluster.Allocation
	state state
	index int
}

func (p *planner) reconcileGroup(g *group, allocs []*cluster.Allocation) {
	holders := make([]named, 0, len(allocs))
	left := map[string]*cluster.Allocation{} // by name, the newest that left a gap
	g.trial = p.trialOf(g, allocs)
	p.trials[g.name] = g.trial > 0
	tried := newTried()
	for _, a := range allocs {
		g.touched = g.touched || p.current(a)
		if a.ServerTerminal() && !a.ClientTerminal() && p.silent(a) && !p.spared(a) {
			g.lose(a)
		}
		s := p.stateOf(a)
		if a.Canary() {
			p.sortCanary(g, tried, named{a, s, nameIndex(a.Name)})
			continue
		}
		switch s {
		case ignored:
		case leaving:
			if old := left[a.Name]; old == nil || old.CreateIndex < a.CreateIndex {
				left[a.Name] = a
			}
		default:
			holders = append(holders, named{a, s, nameIndex(a.Name)})
		}
	}
	var unheards []named
	holding := make([]*cluster.Allocation, max(g.spec.Count, 0)) // by index of the name
	states := make([]state, len(holding))
	for _, h := range sortHolders(g.spec.Disconnect, holders) {
		switch {
		case h.index < 0 || h.index >= len(holding):
			p.drop(g, h, nil)
		case h.state == unheard: // whether its name is free is known only after all others
			unheards = append(unheards, h)
		case holding[h.index] != nil:
			p.drop(g, h, holding[h.index])
		default:
			holding[h.index], states[h.index] = h.Allocation, h.state
			p.keep(g, h)
		}
	}
	for _, h := range unheards {
		p.keepUnheard(g, h, holding[h.index] != nil, left[h.Name])
		holding[h.index], states[h.index] = h.Allocation, h.state
	}
	for i := range holding {
		if holding[i] != nil {
			continue
		}
		w := want{name: fmt.Sprintf("%s.%s[%d]", p.job.ID, g.name, i)}
		if prev := left[w.name]; prev != nil {
			w.prev = prev
			if prev.DesiredDescription == descRescheduled {
				w.rescheduled = p.rescheduleEvent(prev)
			}
		}
		g.wants = append(g.wants, w)
	}
	if p.halted() || g.trial > 0 {
		g.held = p.hold(g)
	}
	if g.spec.Gang != nil {
		p.assemble(g, holding, states)
	} else if g.trial > 0 {
		p.holdGang(g)
		p.reconcileCanaries(g, tried, holding)
	}
	slices.SortStableFunc(g.wants, func(a, b want) int { return cmp.Compare(nameIndex(a.name), nameIndex(b.name)) })
}

// nameIndex reads i of JOB.GROUP[i], -1 when there is none.
func nameIndex(name string) int { return cluster.IndexOf(name) }

// sortHolders orders by index; of several with one name the most worth keeping
// comes first: what is done, what runs, then the newest version, then, after a node
// has come back, what the disconnect block prefers.
func sortHolders(d *cluster.DisconnectStrategy, hs []named) []named {
	slices.SortFunc(hs, func(a, b named) int {
		if a.index != b.index { // nearly always
			return a.index - b.index
		}
		return cmp.Or(
			cmp.Compare(a.state, b.state),
			cmp.Compare(b.JobCreateIndex, a.JobCreateIndex),
			cmp.Compare(b.JobVersion, a.JobVersion),
			preferred(d, a.Allocation, b.Allocation),
			cmp.Compare(a.ID, b.ID),
		)
	})
	return hs
}

// drop ends an allocation that the group has no name for, or whose name has gone
// to another (nil: to none).
func (p *planner) drop(g *group, h named, holder *cluster.Allocation) {
	switch h.state {
	case done:
	case held:
		g.counts.Ignore++
		p.paused = true
	case lost:
		g.lose(h.Allocation)
	case unheard:
		if p.silent(h.Allocation) {
			g.lose(h.Allocation)
		} else {
			g.counts.Stop++
			g.stop(h.Allocation, descNotNeeded)
		}
	default:
		if h.ClientTerminal() {
			return
		}
		g.counts.Stop++
		order := stopOf(h.Allocation, descNotNeeded)
		if holder != nil && !holder.ClientTerminal() && (h.NextAllocation != "" || holder.NextAllocation != "") {
			order.DesiredDescription, order.Keeps = descReconnected, holder.ID
		}
		g.stops = append(g.stops, ending{h.Allocation, order})
	}
}

// keep decides what happens to an allocation that holds a name.
func (p *planner) keep(g *group, h named) {
	a := h.Allocation
	switch h.state {
	case done:
		g.counts.Ignore++
	case lost:
		g.lose(a)
		g.wants = append(g.wants, want{name: a.Name, prev: a})
	case moving:
		g.counts.Migrate++
		if set(a.DesiredTransition.Migrate) {
			g.stop(a, descMigrating)
		} else {
			g.stop(a, descUnfit)
		}
		g.wants = append(g.wants, want{name: a.Name, prev: a, moves: true})
	case held:
		g.counts.Ignore++
		p.paused = true
	case failed:
		g.kept = append(g.kept, a)
		p.keepFailed(g, a)
	case running:
		g.kept = append(g.kept, a)
		switch {
		case p.current(a):
			g.counts.Ignore++
		case p.updatable(g, a):
			g.inPlace = append(g.inPlace, a)
		default:
			g.destroy = append(g.destroy, a)
		}
	}
}

// keepFailed replaces a failed allocation now, later or never.
func (p *planner) keepFailed(g *group, a *cluster.Allocation) {
	at, ok := p.nextTry(g, a)
	switch {
	case !ok:
		g.counts.Ignore++
	case at <= p.in.Now || a.FollowupEvalID == p.in.Eval.ID || set(a.DesiredTransition.Reschedule):
		g.wants = append(g.wants, want{name: a.Name, prev: a, stop: descRescheduled, rescheduled: p.rescheduleEvent(a)})
	default:
		g.counts.Ignore++
		g.later = append(g.later, later{a, at})
	}
}

// nextTry says when a failed allocation may be replaced; false: never. What has reached its run time limit would
// only run for as long again.
func (p *planner) nextTry(g *group, a *cluster.Allocation) (cluster.Time, bool) {
	switch {
	case set(a.DesiredTransition.ForceReschedule):
		return p.in.Now, true
	case a.OverLimit():
		return 0, false
	}
	return nextReschedule(g.spec.ReschedulePolicy, a)
}

func (p *planner) rescheduleEvent(a *cluster.Allocation) *cluster.RescheduleEvent {
	return &cluster.RescheduleEvent{
		PrevAllocID: a.ID, PrevNodeID: a.NodeID,
		Delay: nextDelay(p.job.Group(a.TaskGroup).ReschedulePolicy, a),
	}
}

// halted says whether the deployment of the job's version stopped its roll-out.
func (p *planner) halted() bool {
	return p.deployment != nil && p.deployment.Status != cluster.DeploymentRunning
}

func (p *planner) deploymentFailed() bool {
	return p.deployment != nil && p.deployment.Status == cluster.DeploymentFailed
}

// hold leaves out what a failed or paused deployment, or one whose canaries are not promoted, must not place. Lost
// and moving work is replaced all the same, and so is what failed outside of it. It says whether there was such.
func (p *planner) hold(g *group) (held bool) {
	had := len(g.wants)
	failed := p.deploymentFailed()
	g.wants = slices.DeleteFunc(g.wants, func(w want) bool {
		failedHere := failed && w.rescheduled != nil && w.prev.DeploymentID == p.deployment.ID
		if failedHere && !w.away {
			g.counts.Ignore++
			return true
		}
		return w.prev == nil
	})
	return len(g.wants) < had
}

// updatable says whether an allocation can take over the job's version without
// a restart: what its processes were started with is the same, and its node still
// satisfies the job.
func (p *planner) updatable(g *group, a *cluster.Allocation) bool {
	if a.JobCreateIndex != p.job.CreateIndex {
		return false
	}
	old := p.reader.JobVersion(nil, a.JobKey(), a.JobVersion)
	if old == nil || old.Type != p.job.Type {
		return false
	}
	was := old.Group(g.name)
	if was == nil || !sameStart(old, was, p.job, g.spec) {
		return false
	}
	n := p.byID[a.NodeID].node
	return n.InPool(p.job.NodePool) && cluster.InDatacenters(p.job.Datacenters, n.Datacenter) &&
		newDemand(p.job, g.spec).filter(n) == ""
}

// startForm holds all that a running task cannot take over: everything else
// (counts, policies, kill timeout, constraints) changes in place.
type startForm struct {
	Meta     map[string]string
	Disk     *cluster.EphemeralDisk
	Networks []*cluster.NetworkResource
	Tasks    []taskForm
	Payload  []byte
	Gang     int // how many members they are told of; 0: it is no gang
}

type taskForm struct {
	Name, Driver, User, Config string
	Env, Meta                  map[string]string
	Resources                  *cluster.Resources
	LogConfig                  *cluster.LogConfig
	Artifacts                  []*cluster.Artifact
	Templates                  []*cluster.Template
	Leader                     bool
	Model                      *cluster.ModelRef
	DispatchPayload            *cluster.DispatchPayloadConfig
	Lifecycle                  *cluster.TaskLifecycle
}

func formOf(j *cluster.Job, g *cluster.TaskGroup) startForm {
	f := startForm{Disk: g.EphemeralDisk, Networks: g.Networks, Meta: merged(j.Meta, g.Meta), Payload: j.Payload}
	if g.Gang != nil {
		f.Gang = g.Count
	}
	for _, t := range g.Tasks {
		config, model := pinned(t)
		tf := taskForm{
			Name: t.Name, Driver: t.Driver, User: t.User, Config: config,
			Env: t.Env, Meta: t.Meta, Resources: withoutAffinities(t.Resources), LogConfig: t.LogConfig,
			Artifacts: t.Artifacts, Templates: t.Templates, Leader: t.Leader, Model: model, DispatchPayload: t.DispatchPayload,
			Lifecycle: t.Lifecycle,
		}
		f.Tasks = append(f.Tasks, tf)
	}
	return f
}

// pinned gives a task's config and model without the words by which the model was found: a job that is taken back
// names the version that an alias meant.
func pinned(t *cluster.Task) (config string, model *cluster.ModelRef) {
	if t.Model == nil || t.Model.Version == 0 {
		return string(t.Config), t.Model
	}
	m := *t.Model
	m.Reference, m.Alias = "", ""
	words := map[string]json.RawMessage{}
	if err := json.Unmarshal(t.Config, &words); err != nil {
		return string(t.Config), &m // no driver takes such a config
	}
	delete(words, "model")
	rest, _ := json.Marshal(words) // what was just read
	return string(rest), &m
}

// withoutAffinities leaves out which devices a task would rather have: it runs on
// with those that it has.
func withoutAffinities(r *cluster.Resources) *cluster.Resources {
	if r == nil || len(r.Devices) == 0 {
		return r
	}
	plain := *r
	plain.Devices = make([]*cluster.RequestedDevice, len(r.Devices))
	for i, d := range r.Devices {
		own := *d
		own.Affinities = nil
		plain.Devices[i] = &own
	}
	return &plain
}

func merged(outer, inner map[string]string) map[string]string {
	m := maps.Clone(outer)
	if m == nil {
		m = map[string]string{}
	}
	maps.Copy(m, inner)
	return m
}

func sameStart(oldJob *cluster.Job, old *cluster.TaskGroup, job *cluster.Job, g *cluster.TaskGroup) bool {
	return bytes.Equal(cluster.Marshal(formOf(oldJob, old)), cluster.Marshal(formOf(job, g)))
}
