package sim

import (
	"container/heap"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/scheduler"
)

// DayConfig is how a trace is made into a day. Zero values take the defaults.
type DayConfig struct {
	Seed       uint64
	Jobs       int           // that are submitted in the day; 20,000
	Load       int           // percent of all GPU time of the day that they ask for; 100
	Gangs      int           // percent of the preemptible jobs with one whole GPU that become gangs; 2. Negative: no gangs at all
	Checkpoint time.Duration // between two checkpoints of what may be preempted; 0: it saves nothing
	Tick       time.Duration // in which agents report and the scheduler decides; a minute
	Plain      bool          // no tenants, no quotas, no preemption: by priority, and then the oldest first

	Progress func(ended, jobs int) // told once in each tick; nil: nobody is
}

// Bounds of a day.
const (
	dayLength    = 24 * time.Hour
	dayDrain     = 48 * time.Hour // after it, for what was submitted to end
	dayLongest   = 12 * time.Hour // a job, once stretched
	dayShortest  = time.Minute
	dayJitter    = 30 * time.Minute // around the time of day at which its pod was created
	dayCarry     = 10 * time.Minute // in which the work arrives that the day before has left
	dayProtected = 5 * time.Minute  // rx_min_runtime of what may be preempted
	dayGrace     = time.Minute      // rx_preempt_grace
	dayCollect   = 10 * time.Minute
	dayBatch     = 64      // evaluations planned on one snapshot, as a worker does
	dayRounds    = 100_000 // batches of one tick: more means that deciding never ends
	dayReport    = 500     // allocations in one command
)

// DayClasses are the classes of work, the most urgent first: LS and Guaranteed serve and nothing preempts them;
// Burstable and BE may be preempted.
var DayClasses = []string{"LS", "Burstable", "BE"}

var dayPriority = []int{70, 50, 30}

// dayTenants are the namespaces that pods fall to by the hash of their names, and their quotas.
var dayTenants = []struct {
	name        string
	pods, quota int // percent of the pods, and of the GPUs
}{{"vision", 25, 30}, {"speech", 20, 25}, {"search", 20, 20}, {"ads", 20, 15}, {"research", 15, 10}}

// DayReport is what became of a day.
type DayReport struct {
	Submitted int           `json:"submitted"`      // jobs, with those that the day before has left
	Gangs     int           `json:"gangs"`          // of them
	Stretch   float64       `json:"stretch"`        // of the pods' run times
	Load      float64       `json:"load_pct"`       // GPU time asked for, of that of the day
	Allocated float64       `json:"allocated_pct"`  // GPU time of the day that was held
	Useful    float64       `json:"useful_pct"`     // … less what was done anew
	Lost      float64       `json:"lost_pct"`       // of the GPU time that was held until the end, what preemption made be done anew
	Preempted int           `json:"preemptions"`    // jobs, each time
	Jain      float64       `json:"jain"`           // of what tenants got of what was theirs
	Ended     time.Duration `json:"ended_ns"`       // of all work, since the day began
	Plans     int           `json:"plans"`          // of one evaluation
	GangWaits DayWaits      `json:"gang_waits"`     //
	Classes   []DayWaits    `json:"waits_by_class"` // as DayClasses
	Tenants   []DayTenant   `json:"tenants"`
	Course    []DayPoint    `json:"course"`
	Waits     [][]float64   `json:"-"` // in seconds, sorted, by class
	Faults    []error       `json:"-"` // invariants that did not hold, at most maxDayFaults
}

const maxDayFaults = 20

// DayWaits are waits from submission to the first start, in seconds.
type DayWaits struct {
	Jobs         int     `json:"jobs"`
	P50, P99     float64 //
	Longest      float64 `json:"longest"`
	NeverStarted int     `json:"never_started"`
}

// DayTenant is what one namespace got, in percent of the GPU time of the day.
type DayTenant struct {
	Name     string  `json:"name"`
	Asked    float64 `json:"asked_pct"`
	Entitled float64 `json:"entitled_pct"` // its quota
	Got      float64 `json:"got_pct"`
	Longest  float64 `json:"longest_wait_s"`
	Ended    int     `json:"ended"` // jobs
	Jobs     int     `json:"jobs"`
}

// DayPoint is a look at one time.
type DayPoint struct {
	At      float64   `json:"at_s"`
	Held    []float64 `json:"gpus_by_class"`
	Waiting int       `json:"waiting"` // jobs
}

// dayJob is one job of the day.
type dayJob struct {
	spec           *cluster.Job
	class, tenant  int
	milli          int64 // of GPUs, of all members
	members        int
	arrives        int64 // seconds since the begin of the day
	length, saved  int64 // seconds of work, and what checkpoints have of it
	first          int64 // its first start, -1: none yet
	began, checked int64
	ends           int64 // of the run, by itself or by its grace; 0: it does not run
	evicted        bool
	ended          bool
	at             int // in the heap
	live           []*cluster.Allocation
}

// day is a run of it.
type day struct {
	cfg     DayConfig
	trace   *Trace
	rnd     *rand.Rand
	state   *cluster.State
	steps   *scheduler.Steps
	index   uint64
	now     int64 // seconds
	jobs    []*dayJob
	byKey   map[cluster.JobKey]*dayJob
	running dayHeap
	open    int // jobs that have not ended
	waiting int // that have arrived and do not run

	held, got  []int64 // thousandths of GPUs, by class; thousandth-seconds in the day, by tenant
	total      int64   // thousandth-seconds, of all time
	inDay      int64
	lost       int64
	lostInDay  int64
	report     *DayReport
	quotaMilli []int64
}

// Day submits a day of the trace's pods to a region's rules and scheduler, in virtual time, and
// lets agents run them. It is the same for the same configuration.
//
// Of the trace are taken what pods ask for, their class, the time of day at which they were created
// and for how long they were there. Pods are drawn by the seed, and all run times are stretched
// by one factor such that what is submitted asks for Load percent of the GPUs' time. What a day like this one
// would have left behind arrives within the first minutes, with the rest of its run time.
func (t *Trace) Day(ctx context.Context, cfg DayConfig) (*DayReport, error) {
	for _, d := range []struct {
		value *int
		unset int
	}{{&cfg.Jobs, 20_000}, {&cfg.Load, 100}, {&cfg.Gangs, 2}} {
		if *d.value == 0 {
			*d.value = d.unset
		}
	}
	if cfg.Tick == 0 {
		cfg.Tick = time.Minute
	}
	if cfg.Jobs < 1 || cfg.Jobs > 1_000_000 || cfg.Load < 1 || cfg.Load > 1000 || cfg.Gangs > 100 || cfg.Tick < time.Second || cfg.Checkpoint < 0 {
		return nil, errors.New("a day has 1 to 1,000,000 jobs, a load of 1 to 1000 %, at most 100 % gangs and ticks of a second at least")
	}
	d := &day{
		cfg: cfg, trace: t, rnd: rand.New(rand.NewPCG(cfg.Seed, 0xda)), state: cluster.NewState(),
		byKey: map[cluster.JobKey]*dayJob{}, held: make([]int64, len(DayClasses)), got: make([]int64, len(dayTenants)),
		report: &DayReport{},
	}
	if err := d.submissions(); err != nil {
		return nil, err
	}
	ids := rand.New(rand.NewPCG(cfg.Seed, 0x1d))
	newID := func() string { return fmt.Sprintf("%016x-%016x", ids.Uint64(), ids.Uint64()) }
	d.steps = scheduler.NewSteps(scheduler.Retention{
		EvalGCThreshold: time.Hour, BatchEvalGCThreshold: time.Hour, JobGCThreshold: time.Hour,
	}, newID)
	if err := d.build(); err != nil {
		return nil, err
	}
	if err := d.live(ctx, newID); err != nil {
		return nil, err
	}
	return d.sumUp(), nil
}

// classOf maps a pod's class.
func classOf(qos string) int {
	switch qos {
	case "LS", "Guaranteed":
		return 0
	case "Burstable":
		return 1
	}
	return 2
}

func tenantOf(pod string) int {
	h := fnv.New32a()
	h.Write([]byte(pod))
	at := int(h.Sum32() * 2654435761 >> 16 % 100) // multiplied: names differ in their last digits
	for i, t := range dayTenants {
		if at -= t.pods; at < 0 {
			return i
		}
	}
	return 0
}

// submissions draws the jobs.
func (d *day) submissions() error {
	var pods []*TracePod
	for i := range d.trace.Pods {
		if p := &d.trace.Pods[i]; p.Deleted > p.Created {
			pods = append(pods, p)
		}
	}
	if len(pods) == 0 {
		return errors.New("pods: none has creation_time and deletion_time")
	}
	seconds := int64(dayLength / time.Second)
	raw := map[*dayJob]int64{}
	for i := range 2 * d.cfg.Jobs { // the day before, and the day
		p := pods[d.rnd.IntN(len(pods))]
		j := d.job(p, i)
		jitter := d.rnd.Int64N(int64(dayJitter / time.Second))
		j.arrives = (p.Created + jitter) % seconds
		if i < d.cfg.Jobs {
			j.arrives -= seconds
		}
		raw[j] = p.Deleted - p.Created
		d.jobs = append(d.jobs, j)
	}
	stretched := func(j *dayJob, by float64) int64 {
		return max(int64(dayShortest/time.Second), min(int64(dayLongest/time.Second), int64(by*float64(raw[j]))))
	}
	capacity := float64(d.trace.Capacity() * seconds)
	load := func(by float64) (sum float64) {
		for _, j := range d.jobs[d.cfg.Jobs:] {
			sum += float64(j.milli * stretched(j, by))
		}
		return 100 * sum / capacity
	}
	low, high := 0.0, 1e6
	if most := load(high); most < float64(d.cfg.Load) {
		return fmt.Errorf("%d jobs of at most %s ask for %.0f %% of the GPUs' time, less than the load of %d %%: submit more", d.cfg.Jobs, dayLongest, most, d.cfg.Load)
	}
	for range 60 {
		if mid := (low + high) / 2; load(mid) < float64(d.cfg.Load) {
			low = mid
		} else {
			high = mid
		}
	}
	d.report.Stretch, d.report.Load = high, load(high)
	kept := d.jobs[:0]
	for _, j := range d.jobs {
		j.length = stretched(j, high)
		if j.arrives < 0 {
			if j.length += j.arrives; j.length < int64(dayShortest/time.Second) {
				continue
			}
			j.arrives = d.rnd.Int64N(int64(dayCarry / time.Second))
		}
		kept = append(kept, j)
		d.byKey[j.spec.Key()] = j
		if j.members > 1 {
			d.report.Gangs++
		}
	}
	d.jobs = kept
	slices.SortStableFunc(d.jobs, func(a, b *dayJob) int { return int(a.arrives - b.arrives) })
	d.open, d.report.Submitted = len(d.jobs), len(d.jobs)
	return nil
}

// job makes a pod into a job. Some of those with whole GPUs become gangs: half of those with several GPUs, with
// one on each member, and, of those with one that may be preempted, Gangs percent, with 4, 8 or 16 members.
func (d *day) job(p *TracePod, nr int) *dayJob {
	j := &dayJob{class: classOf(p.QoS), tenant: tenantOf(p.Name), members: 1, milli: p.Demand(), first: -1, at: -1}
	ask := p.asks()
	g := &cluster.TaskGroup{Name: "g", Count: 1, Tasks: []*cluster.Task{{Name: "t", Driver: "exec", Resources: ask}}}
	whole := p.GPUs > 0 && p.Milli == cluster.WholeMilli
	switch draw := d.rnd.IntN(100); {
	case d.cfg.Gangs < 0 || !whole:
	case p.GPUs > 1 && draw < 50:
		j.members = int(p.GPUs)
		ask.CPU, ask.MemoryMB, ask.Devices[0].Count = ask.CPU/j.members, ask.MemoryMB/j.members, 1
	case p.GPUs == 1 && j.class > 0 && draw < d.cfg.Gangs: // training; what serves could not exceed its quota
		j.members = []int{4, 8, 16}[d.rnd.IntN(3)]
		j.milli *= int64(j.members)
	}
	if g.Count = j.members; j.members > 1 {
		g.Gang = &cluster.Gang{}
	}
	j.spec = &cluster.Job{
		Region: "global", Namespace: cluster.DefaultNamespace, ID: fmt.Sprintf("j%06d", nr), Type: cluster.JobTypeBatch, Priority: dayPriority[j.class],
		Datacenters: []string{"*"}, NodePool: cluster.DefaultNodePool, TaskGroups: []*cluster.TaskGroup{g},
	}
	j.spec.Name = j.spec.ID
	if !d.cfg.Plain {
		j.spec.Namespace = dayTenants[j.tenant].name
		g.Preempt = &cluster.PreemptPolicy{Never: true}
		if j.class > 0 {
			g.Preempt = &cluster.PreemptPolicy{Reclaim: true, MinRuntime: dayProtected, Grace: dayGrace}
		}
	}
	return j
}

// build makes the region: nodes, and tenants that lend each other what they do not use.
func (d *day) build() error {
	for _, n := range d.trace.records() {
		if _, err := d.apply(&cluster.RegisterNode{Node: n}); err != nil {
			return err
		}
	}
	config := &cluster.SchedulerConfiguration{SchedulerAlgorithm: "binpack"}
	if !d.cfg.Plain {
		config.PreemptionConfig.BatchSchedulerEnabled = true
		for _, t := range dayTenants {
			gpus := d.trace.Capacity() / cluster.WholeMilli * int64(t.quota) / 100
			d.quotaMilli = append(d.quotaMilli, gpus*cluster.WholeMilli)
			if _, err := d.apply(&cluster.UpsertQuotas{Quotas: []*cluster.Quota{{Name: t.name, Limits: []*cluster.QuotaLimit{{
				Region: "global", Devices: []*cluster.QuotaDevice{{Name: "nvidia/gpu", Count: gpus}},
			}}}}}); err != nil {
				return err
			}
			if _, err := d.apply(&cluster.UpsertNamespaces{Namespaces: []*cluster.Namespace{{
				Name: t.name, Quota: t.name, Meta: map[string]string{cluster.MetaCohort: "day"},
			}}}); err != nil {
				return err
			}
		}
	}
	_, err := d.apply(&cluster.SetSchedulerConfig{Config: config})
	return err
}

// clock is the virtual time.
func (d *day) clock() cluster.Time { return cluster.Time(epoch + d.now*int64(time.Second)) }

func (d *day) apply(c cluster.Command) (cluster.Result, error) {
	d.index++
	*cluster.StampOf(c) = cluster.Stamp{Time: int64(d.clock())}
	res, err := d.state.Apply(d.index, cluster.EncodeCommand(c))
	if err == nil && res.Err != nil {
		err = fmt.Errorf("%T: %w", c, res.Err)
	}
	return res, err
}

// live lets the time pass until everything has ended.
func (d *day) live(ctx context.Context, newID func() string) error {
	tick, next := int64(d.cfg.Tick/time.Second), 0
	for ; d.open > 0 && d.now < int64((dayLength+dayDrain)/time.Second); d.now += tick {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := d.agents(); err != nil {
			return err
		}
		for ; next < len(d.jobs) && d.jobs[next].arrives <= d.now; next++ {
			if _, err := d.apply(&cluster.RegisterJob{Job: d.jobs[next].spec, EvalID: newID()}); err != nil {
				return err
			}
			d.waiting++
		}
		if err := d.decide(); err != nil {
			return err
		}
		if d.now%int64(dayCollect/time.Second) == 0 {
			for _, c := range d.steps.Collect(d.state.Snapshot(), d.clock()) {
				if _, err := d.apply(c); err != nil && cluster.CodeOf(err) != cluster.CodeNotFound {
					return err
				}
			}
		}
		d.look(tick)
		if cfg := &d.cfg; cfg.Progress != nil {
			cfg.Progress(len(d.jobs)-d.open, len(d.jobs))
		}
	}
	d.report.Ended = time.Duration(d.now) * time.Second
	if d.open > 0 {
		d.fault("%d jobs have not ended %s after the day", d.open, dayDrain)
	}
	return nil
}

func (d *day) fault(format string, args ...any) {
	if len(d.report.Faults) < maxDayFaults {
		d.report.Faults = append(d.report.Faults, fmt.Errorf("at %s: "+format, append([]any{time.Duration(d.now) * time.Second}, args...)...))
	}
}

// agents end what is over and tell of it, and of checkpoints.
func (d *day) agents() error {
	var said []*cluster.Allocation
	for len(d.running) > 0 && d.running[0].ends <= d.now {
		j := heap.Pop(&d.running).(*dayJob)
		said = append(said, d.say(j, cluster.AllocClientComplete)...)
		d.end(j)
	}
	if every := int64(d.cfg.Checkpoint / time.Second); every > 0 {
		for _, j := range d.running { // in an order that is the same each time
			if j.class > 0 && !j.evicted && d.now-j.checked >= every {
				j.checked += (d.now - j.checked) / every * every
				said = append(said, d.say(j, cluster.AllocClientRunning)...)
			}
		}
	}
	return d.tell(said)
}

func (d *day) tell(said []*cluster.Allocation) error {
	for part := range slices.Chunk(said, dayReport) {
		if _, err := d.apply(&cluster.UpdateAllocs{Allocs: part}); err != nil {
			return err
		}
	}
	return nil
}

// end takes note of the end of a run.
func (d *day) end(j *dayJob) {
	d.held[j.class] -= j.milli
	if j.evicted {
		ran := j.ends - j.began
		if every := int64(d.cfg.Checkpoint / time.Second); every > 0 {
			ran -= ran / every * every
			j.saved = min(j.saved+(j.ends-j.began)/every*every, j.length-1)
		}
		d.lost += ran * j.milli
		if j.ends <= int64(dayLength/time.Second) {
			d.lostInDay += ran * j.milli
		}
		d.waiting++
	} else {
		j.ended = true
		d.open--
	}
	j.live, j.ends, j.evicted = nil, 0, false
}

// say is what agents report of a job's allocations.
func (d *day) say(j *dayJob, status string) (said []*cluster.Allocation) {
	for _, a := range j.live {
		ts := &cluster.TaskState{State: cluster.TaskStateRunning, StartedAt: cluster.Time(epoch + j.began*int64(time.Second))}
		if status == cluster.AllocClientComplete {
			ts.State, ts.FinishedAt = cluster.TaskStateDead, d.clock()
		}
		u := &cluster.Allocation{ID: a.ID, NodeID: a.NodeID, ClientStatus: status, TaskStates: map[string]*cluster.TaskState{"t": ts}}
		if j.checked > j.began {
			u.Checkpoints = map[string]*cluster.Checkpoint{"t": {Step: j.saved + j.checked - j.began, Time: cluster.Time(epoch + j.checked*int64(time.Second)), Path: "checkpoint"}}
		}
		said = append(said, u)
	}
	return said
}

// decide lets the scheduler work until it has nothing more to do.
func (d *day) decide() error {
	for range dayRounds {
		b, _ := d.steps.Plan(d.state.Snapshot(), d.clock(), dayBatch)
		if b == nil {
			return nil
		}
		cmd := b.Command()
		d.report.Plans += len(cmd.Plans)
		res, err := d.apply(cmd)
		if err != nil {
			return err
		}
		for _, c := range b.Settle(res, nil, d.clock()) {
			if _, err := d.apply(c); err != nil {
				return err
			}
		}
		if err := d.follow(cmd); err != nil {
			return err
		}
	}
	return fmt.Errorf("at %s the scheduler still decides after %d batches", time.Duration(d.now)*time.Second, dayRounds)
}

// follow does what committed plans say: it starts what was placed and gives notice to what was preempted.
func (d *day) follow(cmd *cluster.ApplyPlans) error {
	snap := d.state.Snapshot()
	touched := map[*dayJob]bool{}
	var order []*dayJob
	note := func(key cluster.JobKey) {
		if j := d.byKey[key]; !touched[j] {
			touched[j] = true
			order = append(order, j)
		}
	}
	for _, p := range cmd.Plans {
		if len(p.Place) > 0 {
			note(cluster.JobKey{Namespace: p.Namespace, ID: p.JobID})
		}
		for _, s := range p.Stop {
			if a := snap.Alloc(nil, s.AllocID); a != nil {
				note(a.JobKey())
			}
		}
	}
	var said []*cluster.Allocation
	for _, j := range order {
		var live, leaving []*cluster.Allocation
		for _, a := range snap.AllocsByJob(nil, j.spec.Key()) {
			switch {
			case a.ClientTerminal():
			case a.ServerTerminal():
				leaving = append(leaving, a)
			default:
				live = append(live, a)
			}
		}
		switch {
		case len(live)+len(leaving) == 0:
		case len(live) > 0 && len(leaving) > 0, len(live)+len(leaving) != j.members:
			d.fault("%s of %d members has %d, and %d on their way out: a half gang", j.spec.ID, j.members, len(live), len(leaving))
		case len(leaving) > 0 && !j.evicted && j.ends > 0:
			j.evicted = true
			d.report.Preempted++
			j.ends = min(j.ends, d.now+int64(dayGrace/time.Second)) // near its end or not, it is placed again
			heap.Fix(&d.running, j.at)
		case len(live) > 0 && j.ends == 0:
			j.live, j.began, j.checked = live, d.now, d.now
			j.ends = d.now + max(1, j.length-j.saved)
			if j.first < 0 {
				j.first = d.now
			}
			d.held[j.class] += j.milli
			d.waiting--
			heap.Push(&d.running, j)
			said = append(said, d.say(j, cluster.AllocClientRunning)...)
		}
	}
	return d.tell(said)
}

// look notes how things are, checks what must always hold, and counts the time until the next look.
func (d *day) look(tick int64) {
	held := int64(0)
	for _, h := range d.held {
		held += h
	}
	if held > d.trace.Capacity() {
		d.fault("%d thousandths of GPUs are held, of %d", held, d.trace.Capacity())
	}
	d.total += held * tick
	inDay := d.now < int64(dayLength/time.Second)
	firm := make([]int64, len(dayTenants))
	for _, j := range d.running {
		if inDay {
			d.got[j.tenant] += j.milli * tick
		}
		if j.class == 0 {
			firm[j.tenant] += j.milli
		}
	}
	for t, quota := range d.quotaMilli {
		if firm[t] > quota {
			d.fault("%s holds %d thousandths of GPUs for what may not be preempted, of a quota of %d", dayTenants[t].name, firm[t], quota)
		}
	}
	if !inDay {
		return
	}
	d.inDay += held * tick
	p := DayPoint{At: float64(d.now), Waiting: d.waiting}
	for _, h := range d.held {
		p.Held = append(p.Held, float64(h)/cluster.WholeMilli)
	}
	d.report.Course = append(d.report.Course, p)
}

func (d *day) sumUp() *DayReport {
	r, seconds := d.report, int64(dayLength/time.Second)
	whole := float64(d.trace.Capacity() * seconds)
	r.Allocated, r.Useful = 100*float64(d.inDay)/whole, 100*float64(d.inDay-d.lostInDay)/whole
	r.Lost = 100 * float64(d.lost) / math.Max(float64(d.total), 1)
	waits, gangs := make([][]float64, len(DayClasses)), []float64{}
	never, gangsNever := make([]int, len(DayClasses)), 0
	asked := make([]int64, len(dayTenants))
	for i, t := range dayTenants {
		r.Tenants = append(r.Tenants, DayTenant{Name: t.name, Entitled: float64(t.quota), Got: 100 * float64(d.got[i]) / whole})
	}
	for _, j := range d.jobs {
		t := &r.Tenants[j.tenant]
		asked[j.tenant] += j.milli * min(j.length, seconds-j.arrives)
		wait := float64(max(0, j.first-j.arrives))
		if j.first < 0 {
			wait = float64(d.now - j.arrives)
			never[j.class]++
			if j.members > 1 {
				gangsNever++
			}
		}
		waits[j.class] = append(waits[j.class], wait)
		if j.members > 1 {
			gangs = append(gangs, wait)
		}
		if t.Longest, t.Jobs = max(t.Longest, wait), t.Jobs+1; j.ended {
			t.Ended++
		}
	}
	for c := range waits {
		r.Classes = append(r.Classes, waitsOf(waits[c], never[c]))
	}
	r.Waits, r.GangWaits = waits, waitsOf(gangs, gangsNever)
	sum, squares := 0.0, 0.0
	for i := range r.Tenants {
		t := &r.Tenants[i]
		t.Asked = 100 * float64(asked[i]) / whole
		x := 1.0
		if due := min(t.Asked, t.Entitled); due > 0 {
			x = min(1, t.Got/due)
		}
		sum, squares = sum+x, squares+x*x
	}
	r.Jain = sum * sum / (float64(len(r.Tenants)) * math.Max(squares, 1e-9))
	return r
}

func waitsOf(w []float64, never int) DayWaits {
	slices.Sort(w)
	if len(w) == 0 {
		return DayWaits{}
	}
	at := func(q float64) float64 { return w[min(len(w)-1, int(q*float64(len(w))))] }
	return DayWaits{Jobs: len(w), P50: at(0.5), P99: at(0.99), Longest: w[len(w)-1], NeverStarted: never}
}

// dayHeap has the job first whose run ends first.
type dayHeap []*dayJob

func (h dayHeap) Len() int { return len(h) }
func (h dayHeap) Less(i, j int) bool {
	return h[i].ends < h[j].ends || h[i].ends == h[j].ends && h[i].spec.ID < h[j].spec.ID
}
func (h dayHeap) Swap(i, j int) { h[i], h[j] = h[j], h[i]; h[i].at, h[j].at = i, j }
func (h *dayHeap) Push(x any) {
	x.(*dayJob).at = len(*h)
	*h = append(*h, x.(*dayJob))
}

func (h *dayHeap) Pop() any {
	last := len(*h) - 1
	x := (*h)[last]
	(*h)[last], x.at = nil, -1
	*h = (*h)[:last]
	return x
}
