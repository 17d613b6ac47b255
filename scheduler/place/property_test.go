package place

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// TestPlansHold drives random clusters through jobs, failures, drains and lost
// nodes on the real state. Whatever happens: a plan made on a fresh snapshot is
// never refused, plans of one view never meet, the state's invariants hold (no
// device or port twice, no node over its capacity), no new allocation breaks a
// distinct_property, the same question gets the same answer whether or not placement
// remembers earlier ones, and once all nodes are back no name lives twice.
func TestPlansHold(t *testing.T) {
	seeds, preempted, moved := uint64(25), 0, 0
	if testing.Short() {
		seeds = 10
	}
	for seed := range seeds {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			c := newRandomCluster(t, seed)
			c.run(40)
			preempted, moved = preempted+c.preempted, moved+c.moved
		})
	}
	if preempted == moved {
		t.Error("nothing was preempted: the test shows less than it says")
	}
}

// randomCluster is a state with somebody who does random things to it.
type randomCluster struct {
	t     *testing.T
	rnd   *rand.Rand
	state *cluster.State
	index uint64
	now   cluster.Time
	ids   int
	nodes []string
	cache Cache
	mix   *Mix

	preempted int // allocations
	moved     int // … of them
}

func newRandomCluster(t *testing.T, seed uint64) *randomCluster {
	return &randomCluster{t: t, rnd: rand.New(rand.NewPCG(seed, 1)), state: cluster.NewState(), now: epoch}
}

func (c *randomCluster) id() string {
	c.ids++
	return fmt.Sprintf("%08d-0000-0000-0000-000000000000", c.ids)
}

// apply proposes a command the way a server does.
func (c *randomCluster) apply(cmd cluster.Command, stamp *cluster.Stamp) cluster.Result {
	c.t.Helper()
	c.index++
	c.now = c.now.Add(time.Second)
	stamp.RequestID, stamp.Time = c.id(), int64(c.now)
	res, err := c.state.Apply(c.index, cluster.EncodeCommand(cmd))
	if err != nil {
		c.t.Fatal(err)
	}
	if err := c.state.Snapshot().Check(); err != nil {
		c.t.Fatalf("after %T at %d: %v", cmd, c.index, err)
	}
	return res
}

func (c *randomCluster) run(steps int) {
	config := &cluster.SetSchedulerConfig{Config: &cluster.SchedulerConfiguration{PreemptionConfig: cluster.PreemptionConfig{
		ServiceSchedulerEnabled: c.rnd.IntN(3) > 0, BatchSchedulerEnabled: true,
	}}}
	c.apply(config, &config.Stamp)
	for range 3 + c.rnd.IntN(6) {
		c.addNode()
	}
	for range steps {
		switch c.rnd.IntN(11) {
		case 0:
			c.addNode()
		case 1, 2:
			c.registerJob()
		case 3:
			j := fmt.Sprintf("job%d", c.rnd.IntN(4))
			cmd := &cluster.DeregisterJob{Namespace: cluster.DefaultNamespace, JobID: j, Purge: c.rnd.IntN(3) == 0, EvalID: c.id()}
			c.apply(cmd, &cmd.Stamp)
		case 4:
			status := []string{cluster.NodeStatusDown, cluster.NodeStatusReady, cluster.NodeStatusDisconnected}[c.rnd.IntN(3)]
			cmd := &cluster.UpdateNodeStatus{Updates: []cluster.NodeStatusUpdate{{NodeID: pick(c.rnd, c.nodes), Status: status}}}
			c.apply(cmd, &cmd.Stamp)
		case 5:
			if a := c.anyAlloc(); a != nil { // alloc stop
				yes := true
				cmd := &cluster.UpdateTransitions{Transitions: map[string]cluster.DesiredTransition{a.ID: {Migrate: &yes}}}
				c.apply(cmd, &cmd.Stamp)
				c.evaluate(a.JobKey())
			}
		case 6:
			cmd := &cluster.UpdateDrain{NodeID: pick(c.rnd, c.nodes), MarkEligible: true}
			if c.rnd.IntN(2) == 0 {
				cmd.Strategy = &cluster.DrainStrategy{Deadline: time.Hour}
			}
			c.apply(cmd, &cmd.Stamp)
		case 7:
			cmd := &cluster.SetFleetHold{}
			if c.rnd.IntN(2) == 0 {
				cmd.Hold = &cluster.FleetHold{Reason: "many nodes are silent"}
			}
			c.apply(cmd, &cmd.Stamp)
		default:
			c.report()
		}
		c.answer()
	}
	c.heal()
}

// heal lets all nodes come back and looks whether what runs is what should.
func (c *randomCluster) heal() {
	hold := &cluster.SetFleetHold{}
	c.apply(hold, &hold.Stamp)
	back := &cluster.UpdateNodeStatus{}
	for _, n := range c.nodes {
		back.Updates = append(back.Updates, cluster.NodeStatusUpdate{NodeID: n, Status: cluster.NodeStatusReady})
	}
	c.apply(back, &back.Stamp)
	c.answer()
	said := &cluster.UpdateAllocs{}
	for _, a := range c.state.Snapshot().Allocs(nil, "") {
		if a.ClientStatus == cluster.AllocClientUnknown {
			said.Allocs = append(said.Allocs, &cluster.Allocation{ID: a.ID, ClientStatus: cluster.AllocClientRunning})
		}
	}
	c.apply(said, &said.Stamp)
	c.answer()
	names := map[string]string{}
	for _, a := range c.state.Snapshot().Allocs(nil, "") {
		if a.Terminal() {
			continue
		}
		if a.ClientStatus == cluster.AllocClientUnknown {
			c.t.Errorf("%s is unknown though its node is back", a.ID)
		}
		if other := names[a.Name]; other != "" {
			c.t.Errorf("%s lives twice: %s and %s", a.Name, other, a.ID)
		}
		names[a.Name] = a.ID
	}
}

func (c *randomCluster) anyAlloc() *cluster.Allocation {
	if as := c.state.Snapshot().Allocs(nil, ""); len(as) > 0 {
		return pick(c.rnd, as)
	}
	return nil
}

// evaluate asks for an evaluation of a job, if there is one.
func (c *randomCluster) evaluate(k cluster.JobKey) {
	j := c.state.Snapshot().Job(nil, k)
	if j == nil {
		return
	}
	cmd := &cluster.UpdateEvals{Evals: []*cluster.Evaluation{{
		ID: c.id(), Namespace: j.Namespace, JobID: j.ID, Type: j.Type, Priority: j.Priority,
		TriggeredBy: cluster.TriggerAllocStop, Status: cluster.EvalStatusPending,
	}}}
	c.apply(cmd, &cmd.Stamp)
}

func pick[T any](rnd *rand.Rand, s []T) T { return s[rnd.IntN(len(s))] }

func (c *randomCluster) addNode() {
	l, err := parseLine(fmt.Sprintf("%s cpu=%d memory=%d disk=5000 class=%s attr.x=%d ports_from=20000 ports_to=20005",
		c.id(), 500+c.rnd.IntN(3000), 512+c.rnd.IntN(4096), pick(c.rnd, []string{"a", "b"}), c.rnd.IntN(3)))
	if err != nil {
		c.t.Fatal(err)
	}
	if c.rnd.IntN(2) == 0 {
		l.keys["gpu"], l.keys["gpus"] = pick(c.rnd, []string{"A100", "T4"}), fmt.Sprint(1+c.rnd.IntN(4))
		if c.rnd.IntN(3) == 0 {
			l.keys["gpu2"], l.keys["gpus2"] = "H100", fmt.Sprint(1+c.rnd.IntN(2))
		}
	}
	if c.rnd.IntN(5) > 0 {
		l.keys["meta.rack"] = pick(c.rnd, []string{"r0", "r1", "r2"})
	}
	n := l.node()
	cmd := &cluster.RegisterNode{Node: n}
	c.apply(cmd, &cmd.Stamp)
	c.nodes = append(c.nodes, n.ID)
}

func (c *randomCluster) registerJob() {
	kind := pick(c.rnd, []string{"service", "batch"})
	job := fmt.Sprintf("job job%d type=%s", c.rnd.IntN(4), kind)
	gang := c.rnd.IntN(4) == 0
	switch {
	case gang:
	case c.rnd.IntN(6) == 0:
		job += " all_at_once"
	}
	job += fmt.Sprintf(" priority=%d", pick(c.rnd, []int{20, 35, 50, 80}))
	text := append([]string{job}, c.wishes()...)
	together := " " + pick(c.rnd, []string{"gang", "gang topology=${meta.rack}", "gang topology=${node.unique.id},${meta.rack} required"}) + pick(c.rnd, []string{"", " limited"})
	text = append(text,
		fmt.Sprintf("group g count=%d max_parallel=%d delay=%ds%s", c.rnd.IntN(6), 1+c.rnd.IntN(3), c.rnd.IntN(20), pick(c.rnd, []string{
			"", "", " disconnect lost_after=10s", " disconnect lost_after=100s reconcile=keep_original",
			" disconnect lost_after=100s reconcile=keep_replacement", " disconnect no_replace", " disconnect lost_after=20s no_replace",
		})))
	if group := &text[len(text)-1]; gang {
		*group, _, _ = strings.Cut(*group, " disconnect")
		*group += together
	}
	text[len(text)-1] += pick(c.rnd, []string{"", " move", " move", " never", " min_runtime=20s move"})
	text[len(text)-1] += pick(c.rnd, []string{"", "", " limit=20s", " limit=2m"})
	if c.rnd.IntN(4) == 0 {
		text = append(text, "constraint distinct_hosts")
	}
	text = append(text, c.wishes()...)
	if c.rnd.IntN(3) == 0 { // jobs that differ in nothing but what they wish
		text = append(text, "task t")
	} else {
		text = append(text, fmt.Sprintf("task t cpu=%d memory=%d command=c%d", 50+c.rnd.IntN(500), 64+c.rnd.IntN(512), c.rnd.IntN(3)))
	}
	if c.rnd.IntN(2) == 0 {
		switch c.rnd.IntN(4) {
		case 0:
			text = append(text, fmt.Sprintf("device nvidia/gpu-milli count=%d", 1+c.rnd.IntN(999)))
		case 1:
			text = append(text, fmt.Sprintf("device nvidia/gpu-mib count=%d", 1+c.rnd.IntN(45_000)))
			if c.rnd.IntN(2) == 0 {
				text = append(text, fmt.Sprintf("device nvidia/gpu-milli/T4 count=%d", 1+c.rnd.IntN(500)))
			}
		default:
			text = append(text, fmt.Sprintf("device %s count=%d", pick(c.rnd, []string{"gpu", "nvidia/gpu", "nvidia/gpu/T4"}), 1+c.rnd.IntN(2)))
		}
		if c.rnd.IntN(2) == 0 {
			text = append(text, fmt.Sprintf("affinity ${device.model} = %s weight=%d", pick(c.rnd, []string{"A100", "H100"}), c.weight()))
		}
	}
	if c.rnd.IntN(2) == 0 {
		text = append(text, "port http", "port admin")
	}
	if c.rnd.IntN(4) == 0 {
		text = append(text, "port fixed static=20003")
	}
	w := &world{}
	for _, s := range text {
		l, err := parseLine(s)
		if err != nil {
			c.t.Fatal(err)
		}
		w.version(l, 0)
	}
	cmd := &cluster.RegisterJob{Job: w.versions[0], EvalID: c.id()}
	if res := c.apply(cmd, &cmd.Stamp); res.Err != nil {
		c.t.Fatal(res.Err)
	}
}

func (c *randomCluster) weight() int { return pick(c.rnd, []int{-100, -1, 1, 50, 100}) }

// wishes are what a job or a group may say of where its allocations are to be.
func (c *randomCluster) wishes() (text []string) {
	if c.rnd.IntN(4) == 0 {
		text = append(text, fmt.Sprintf("constraint ${meta.rack} distinct_property %d", 1+c.rnd.IntN(3)))
	}
	if c.rnd.IntN(4) == 0 {
		text = append(text, fmt.Sprintf("affinity ${meta.rack} = r%d weight=%d", c.rnd.IntN(4), c.weight()))
	}
	if c.rnd.IntN(6) == 0 {
		text = append(text, fmt.Sprintf("affinity ${attr.x} >= %d weight=%d", c.rnd.IntN(3), c.weight()))
	}
	if c.rnd.IntN(4) == 0 {
		text = append(text, fmt.Sprintf("spread ${meta.rack} weight=%d%s", c.rnd.IntN(101), pick(c.rnd, []string{"", " r0=50", " r0=60 r1=40", " r5=10"})))
	}
	if c.rnd.IntN(6) == 0 {
		text = append(text, "spread ${node.class}")
	}
	return text
}

// checkDistinct looks whether what a plan has placed, now that it is applied, shares the
// values of its nodes with more of the job, or of its group, than the job wants.
func (c *randomCluster) checkDistinct(j *cluster.Job, p *cluster.Plan) {
	if j == nil {
		return
	}
	snap := c.state.Snapshot()
	for _, placed := range p.Place {
		if placed.CreateIndex > 0 {
			continue // updated in place
		}
		g := j.Group(placed.TaskGroup)
		for _, d := range newDemand(j, g).distinct {
			value, there := nodeLookup(snap.Node(nil, placed.NodeID))(d.target)
			if !there {
				c.t.Fatalf("%s is on a node without %s", placed.Name, d.target)
			}
			sharing := int32(0)
			for _, a := range snap.AllocsByJob(nil, j.Key()) {
				if a.Terminal() || d.group != "" && a.TaskGroup != d.group {
					continue
				}
				if n := snap.Node(nil, a.NodeID); n != nil {
					if v, _ := nodeLookup(n)(d.target); v == value {
						sharing++
					}
				}
			}
			if sharing > d.allowed {
				c.t.Fatalf("%s is placed where %d share %s=%s; at most %d may", placed.Name, sharing, d.target, value, d.allowed)
			}
		}
	}
}

// checkGangs looks whether what a plan has placed of gangs is whole, and in one domain if it must be.
func (c *randomCluster) checkGangs(j *cluster.Job, p *cluster.Plan) {
	if j == nil {
		return
	}
	snap := c.state.Snapshot()
	for _, g := range j.TaskGroups {
		if g.Gang == nil {
			continue
		}
		begun, values := 0, map[string]bool{}
		for _, a := range snap.AllocsByJob(nil, j.Key()) {
			if a.EvalID == p.EvalID && a.CreateIndex == snap.Index(nil) {
				begun++
				if t := g.Gang.Topology; g.Gang.Required && len(t) > 0 {
					v, _ := nodeLookup(snap.Node(nil, a.NodeID))(t[len(t)-1])
					values[v] = true
				}
				for _, other := range snap.AllocsByJob(nil, j.Key()) {
					if other.EvalID != p.EvalID && other.Occupies() && other.JobCreateIndex == j.CreateIndex && nameIndex(other.Name) < g.Count && !snap.Node(nil, other.NodeID).Silent() {
						c.t.Fatalf("gang %s begins though %s (%s) has not ended", j.ID, other.ID, other.DesiredDescription)
					}
				}
			}
		}
		if begun > 0 && begun != g.Count || len(values) > 1 {
			c.t.Fatalf("%d of the %d members of gang %s were placed, over %d domains", begun, g.Count, j.ID, len(values))
		}
	}
}

// moved says whether a plan gives an allocation that it ends a claim on another node.
func moved(p *cluster.Plan, a *cluster.Allocation) bool {
	return slices.ContainsFunc(p.Evals, func(e *cluster.Evaluation) bool {
		return e.JobKey() == a.JobKey() && slices.ContainsFunc(e.Claims, func(c *cluster.Claim) bool { return c.Name == a.Name && c.NodeID != a.NodeID })
	})
}

// checkPreempted looks at what a plan preempts: nothing of nearly equal priority or that is
// protected, whole gangs, and nothing that could have stayed.
func (c *randomCluster) checkPreempted(before *cluster.Snapshot, j *cluster.Job, p *cluster.Plan) {
	gone := map[string]bool{}
	for _, s := range p.Stop {
		if s.PreemptedBy != "" {
			gone[s.AllocID] = true
		}
	}
	if len(gone) == 0 {
		return
	}
	c.preempted += len(gone)
	var claims []*cluster.Claim
	for _, e := range p.Evals {
		claims = append(claims, e.Claims...)
	}
	for id := range gone {
		a := before.Alloc(nil, id)
		job := before.JobVersion(nil, a.JobKey(), a.JobVersion)
		g := job.Group(a.TaskGroup)
		if moved(p, a) {
			if g.Preempt == nil || !g.Preempt.Move || g.Gang != nil || job.Priority > j.Priority || a.Terminal() {
				c.t.Fatalf("%s of priority %d (%+v, %s) is moved for %s of %d", id, job.Priority, g.Preempt, a.ClientStatus, j.ID, j.Priority)
			}
			c.moved++
			continue
		}
		if job.Priority+PriorityGap > j.Priority || g.Preempt != nil && g.Preempt.Never || a.Terminal() {
			c.t.Fatalf("%s of priority %d (%+v, %s) is preempted for %s of %d", id, job.Priority, g.Preempt, a.ClientStatus, j.ID, j.Priority)
		}
		unit := map[string]bool{id: true}
		if g.Gang != nil {
			for _, m := range before.AllocsByJob(nil, a.JobKey()) {
				if m.TaskGroup == a.TaskGroup && m.JobVersion == a.JobVersion && m.JobCreateIndex == a.JobCreateIndex && !m.Terminal() {
					unit[m.ID] = true
					if !gone[m.ID] && !c.state.Snapshot().Alloc(nil, m.ID).Terminal() {
						c.t.Fatalf("%s of a gang is preempted, %s is not", id, m.ID)
					}
				}
			}
		}
		needed := false
		for _, n := range before.Nodes(nil, "") {
			use := cluster.NewNodeUse(n)
			for _, h := range c.state.Snapshot().AllocsHolding(nil, n.ID) {
				if unit[h.ID] || !evicted(h) && !(h.ServerTerminal() && h.JobKey() == j.Key()) {
					use.Add(h)
				}
			}
			mine := false
			for _, e := range c.state.Snapshot().Claims() {
				for _, x := range e.Claims {
					if x.NodeID == n.ID && (e.JobID == j.ID || e.Priority >= j.Priority) {
						use.Add(&cluster.Allocation{ID: x.AllocID, AllocatedResources: x.Resources})
						mine = mine || e.JobID == j.ID
					}
				}
			}
			needed = needed || mine && use.Fault() != ""
		}
		if !needed {
			c.t.Fatalf("%s of %s is preempted for %s though it could stay; claims %d", id, a.JobID, j.ID, len(claims))
		}
	}
}

// report lets the nodes say something of their allocations.
func (c *randomCluster) report() {
	snap := c.state.Snapshot()
	cmd := &cluster.UpdateAllocs{}
	for _, a := range snap.Allocs(nil, "") {
		if n := snap.Node(nil, a.NodeID); a.ClientTerminal() || n == nil || n.Silent() || c.rnd.IntN(2) == 0 {
			continue
		}
		u := &cluster.Allocation{ID: a.ID, Epoch: a.Epoch, ClientStatus: cluster.AllocClientRunning}
		healthy := true
		switch {
		case a.ServerTerminal():
			u.ClientStatus = cluster.AllocClientComplete
		case c.rnd.IntN(6) == 0:
			u.ClientStatus, healthy = cluster.AllocClientFailed, false
			u.TaskStates = map[string]*cluster.TaskState{"t": {State: cluster.TaskStateDead, Failed: true, FinishedAt: c.now}}
		case c.rnd.IntN(6) == 0:
			u.ClientStatus = cluster.AllocClientComplete
		default:
			u.TaskStates = map[string]*cluster.TaskState{"t": {State: cluster.TaskStateRunning, StartedAt: c.now}}
		}
		if a.DeploymentID != "" {
			u.DeploymentStatus = &cluster.AllocDeploymentStatus{Healthy: &healthy}
		}
		cmd.Allocs = append(cmd.Allocs, u)
	}
	c.apply(cmd, &cmd.Stamp)
}

// mixOf is what all jobs ask for; sometimes there is none.
func mixOf(snap *cluster.Snapshot) *Mix {
	var work []Work
	for _, j := range snap.Jobs(nil, "*", "") {
		for _, g := range j.TaskGroups {
			work = append(work, Work{j, g, int64(g.Count)})
		}
	}
	if len(work)%3 == 0 {
		return nil
	}
	return NewMix(work)
}

// answer plans every open evaluation on one view and commits the plans.
func (c *randomCluster) answer() {
	for round := 0; ; round++ {
		if round > 50 {
			c.t.Fatal("evaluations beget evaluations without end")
		}
		snap := c.state.Snapshot()
		seen := map[cluster.JobKey]bool{}
		var open []*cluster.Evaluation
		for _, e := range snap.Evals(nil, "") {
			due := e.Status == cluster.EvalStatusPending && e.WaitUntil <= c.now
			if (due || (round == 0 && e.Status == cluster.EvalStatusBlocked)) && !seen[e.JobKey()] {
				seen[e.JobKey()] = true
				open = append(open, e)
			}
		}
		if len(open) == 0 {
			return
		}
		maxBytes, maxParts := pick(c.rnd, []int{0, 2000}), pick(c.rnd, []int{0, 3})
		plan := func(v *View, ids *int) (plans []*cluster.Plan) {
			for _, e := range open {
				newID := func() string { *ids++; return fmt.Sprintf("%08d-0000-0000-0000-000000000000", *ids) }
				r := v.Plan(Input{Job: snap.Job(nil, e.JobKey()), Eval: e, Now: c.now, NewID: newID, MaxBytes: maxBytes, MaxParts: maxParts})
				if len(r.Earlier) >= max(maxParts, 1) || r.More && r.Empty() {
					c.t.Fatalf("a plan for %s was cut to nothing, or into %d parts", e.JobID, len(r.Earlier)+1)
				}
				plans = append(plans, r.Parts()...)
			}
			return plans
		}
		again := c.ids
		if c.rnd.IntN(4) == 0 {
			c.mix = mixOf(snap)
		}
		var fresh Cache
		c.cache.Expect(c.mix)
		fresh.Expect(c.mix)
		plans := plan(c.cache.View(snap), &c.ids)
		if !bytes.Equal(cluster.Marshal(plans), cluster.Marshal(plan(fresh.View(snap), &again))) {
			c.t.Fatal("the same snapshot, evaluations and IDs gave two different plans, with and without what was known before")
		}
		cmd := &cluster.ApplyPlans{Plans: plans}
		for i, r := range c.apply(cmd, &cmd.Stamp).Plans {
			if r.Stale || len(r.Refused) > 0 {
				c.t.Fatalf("plan for %s was refused: %+v", plans[i].JobID, r)
			}
			job := snap.Job(nil, cluster.JobKey{Namespace: plans[i].Namespace, ID: plans[i].JobID})
			c.checkDistinct(job, plans[i])
			c.checkGangs(job, plans[i])
			c.checkPreempted(snap, job, plans[i])
		}
	}
}
