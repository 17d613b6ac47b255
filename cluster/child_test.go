package cluster

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

func batchJob(id string, change ...func(*Job)) *Job {
	j := testJob(id, 1)
	j.Type, j.TaskGroups[0].Update = JobTypeBatch, nil
	for _, c := range change {
		c(j)
	}
	return j
}

func parameterized(required ...string) func(*Job) {
	return func(j *Job) {
		j.ParameterizedJob = &ParameterizedJobConfig{Payload: PayloadOptional, MetaRequired: required, MetaOptional: []string{"color"}}
		j.TaskGroups[0].Tasks[0].DispatchPayload = &DispatchPayloadConfig{File: "in"}
	}
}

func periodic(j *Job) {
	j.Periodic = &PeriodicConfig{Enabled: true, SpecType: PeriodicSpecCron, Specs: []string{"@hourly"}, TimeZone: "UTC"}
}

// job reads a job that must be there.
func (h *harness) job(id string) *Job {
	h.Helper()
	j := h.Snapshot().Job(nil, JobKey{DefaultNamespace, id})
	if j == nil {
		h.Fatalf("there is no job %s", id)
	}
	return j
}

func (h *harness) children(id string) ChildrenSummary {
	h.Helper()
	s := h.Snapshot().Summary(nil, JobKey{DefaultNamespace, id})
	if s == nil || s.Children == nil {
		h.Fatalf("the summary of job %s counts no children: %+v", id, s)
	}
	return *s.Children
}

// end completes a job's evaluations without a placement: it is dead then.
func (h *harness) end(id string) {
	h.Helper()
	var evals []*Evaluation
	for _, e := range h.Snapshot().EvalsByJob(nil, JobKey{DefaultNamespace, id}) {
		evals = append(evals, answered(e))
	}
	h.must(&UpdateEvals{Evals: evals})
	if j := h.job(id); j.Status != JobStatusDead {
		h.Fatalf("job %s is %s", id, j.Status)
	}
}

func TestDispatch(t *testing.T) {
	h := newHarness(t)
	parent := batchJob("par", parameterized("who"))
	parent.Meta = map[string]string{"color": "red", "size": "s"}
	res := h.must(&RegisterJob{Job: parent, EvalID: h.id()})
	if j := h.job("par"); res.EvalID != "" || len(h.Snapshot().EvalsByJob(nil, j.Key())) > 0 || j.Status != JobStatusRunning {
		t.Fatalf("registration of a parameterized job gave %+v, and it is %s", res, j.Status)
	}
	if c := h.children("par"); c != (ChildrenSummary{}) {
		t.Fatalf("children at first: %+v", c)
	}
	dispatch := &DispatchJob{
		Namespace: DefaultNamespace, JobID: "par", Payload: []byte("in"), Meta: map[string]string{"who": "me", "color": "blue"},
		Priority: 70, IDPrefix: "nightly", IdempotencyToken: "once", EvalID: h.id(),
	}
	res = h.must(dispatch)
	want := fmt.Sprintf("par/dispatch-nightly-%d-", h.now/int64(time.Second))
	child := h.job(res.JobID)
	if digits, ok := strings.CutPrefix(child.ID, want); !ok || len(digits) != 8 || strings.Trim(digits, "0123456789abcdef") != "" {
		t.Errorf("the child is called %s, want %s and 8 hex digits", child.ID, want)
	}
	if child.Name != child.ID || child.ParentID != "par" || !child.Dispatched || string(child.Payload) != "in" || child.Priority != 70 ||
		child.DispatchIdempotencyToken != "once" || child.Status != JobStatusPending || child.Version != 0 || child.CreateIndex != h.index {
		t.Errorf("child %+v", child)
	}
	if meta := map[string]string{"who": "me", "color": "blue", "size": "s"}; !maps.Equal(child.Meta, meta) {
		t.Errorf("the child's meta is %v, want %v", child.Meta, meta)
	}
	if p := h.job("par"); !maps.Equal(p.Meta, map[string]string{"color": "red", "size": "s"}) || p.Priority != DefaultPriority || p.Payload != nil {
		t.Errorf("the parent has changed: %+v", p)
	}
	if e := h.Snapshot().Eval(nil, res.EvalID); e == nil || e.JobID != child.ID || e.TriggeredBy != TriggerJobRegister || e.Priority != 70 || e.Status != EvalStatusPending {
		t.Errorf("evaluation %+v", e)
	}
	if c := h.children("par"); c != (ChildrenSummary{Pending: 1}) {
		t.Errorf("children %+v", c)
	}

	same := *dispatch
	same.EvalID = h.id()
	if again := h.must(&same); again.JobID != child.ID || again.EvalID != "" || len(h.Snapshot().Children(nil, JobKey{DefaultNamespace, "par"})) != 1 {
		t.Errorf("the same token gave %+v", again)
	}
	if other := h.must(&DispatchJob{Namespace: DefaultNamespace, JobID: "par", Meta: map[string]string{"who": "you"}, EvalID: h.id()}); other.JobID == child.ID {
		t.Error("a dispatch without the token gave its child")
	}
	h.end(child.ID)
	if c := h.children("par"); c != (ChildrenSummary{Pending: 1, Dead: 1}) {
		t.Errorf("children %+v after one has ended", c)
	}
	h.must(&Reap{Jobs: []JobKey{child.Key()}})
	if c := h.children("par"); c != (ChildrenSummary{Pending: 1, Dead: 1}) {
		t.Errorf("children %+v after one was forgotten", c)
	}
	if again := h.must(dispatch); again.EvalID == "" || again.JobID == child.ID {
		t.Errorf("the token of a forgotten child gave %+v", again)
	}
}

func TestDispatchNamesAllThatIsWrong(t *testing.T) {
	h := newHarness(t)
	h.must(&RegisterJob{Job: batchJob("par", parameterized("who", "why"))})
	h.must(&RegisterJob{Job: batchJob("in", parameterized(), func(j *Job) { j.ParameterizedJob.Payload = PayloadRequired })})
	h.must(&RegisterJob{Job: batchJob("none", parameterized(), func(j *Job) { j.ParameterizedJob.Payload = PayloadForbidden })})
	h.must(&RegisterJob{Job: batchJob("plain"), EvalID: h.id()})
	h.must(&RegisterJob{Job: batchJob("over", parameterized())})
	h.must(&DeregisterJob{Namespace: DefaultNamespace, JobID: "over", EvalID: h.id()})
	for _, test := range []struct {
		c    DispatchJob
		want []string
	}{
		{DispatchJob{JobID: "par", Meta: map[string]string{"what": "x", "when": "y"}, Payload: make([]byte, MaxPayload+1), Priority: 101}, []string{
			"Dispatch did not provide required meta keys: [who why]", "does not know: [what when]", "Payload exceeds maximum size; 16385 > 16384", "priority is 101",
		}},
		{DispatchJob{JobID: "par", Meta: map[string]string{"who": "", "why": ""}, IDPrefix: "a b", IdempotencyToken: strings.Repeat("x", MaxIdempotencyToken+1)}, []string{
			`prefix "a b"`, "token has 1025 bytes",
		}},
		{DispatchJob{JobID: "in"}, []string{`the payload that job "in" requires`}},
		{DispatchJob{JobID: "none", Payload: []byte("x")}, []string{`a payload, which job "none" forbids`}},
		{DispatchJob{JobID: "plain"}, []string{"not a parameterized job"}},
		{DispatchJob{JobID: "over"}, []string{"is stopped"}},
		{DispatchJob{JobID: "nobody"}, []string{`parameterized job "nobody" not found`}},
	} {
		c := test.c
		c.Namespace, c.EvalID = DefaultNamespace, h.id()
		res := h.do(&c)
		if res.Err == nil {
			t.Errorf("%+v was taken: %+v", test.c, res)
			continue
		}
		for _, want := range test.want {
			if !strings.Contains(res.Err.Text, want) {
				t.Errorf("%s: refused with %q, which lacks %q", c.JobID, res.Err.Text, want)
			}
		}
		if lines := strings.Count(res.Err.Text, "\n") + 1; lines != len(test.want) {
			t.Errorf("%s: %d faults, want %d:\n%s", c.JobID, lines, len(test.want), res.Err.Text)
		}
	}
	full := &DispatchJob{Namespace: DefaultNamespace, JobID: "in", Payload: make([]byte, MaxPayload), EvalID: h.id()}
	if res := h.must(full); len(h.job(res.JobID).Payload) != MaxPayload {
		t.Error("a payload of the greatest size was cut")
	}
	h.must(&SetSchedulerConfig{Config: &SchedulerConfiguration{RejectJobRegistration: true}})
	if res := h.do(full); CodeOf(res.Err) != CodeForbidden {
		t.Errorf("while registrations are refused: %v", res.Err)
	}
}

// TestParentsEndWithoutTheirChildren: stopping and purging a parent leaves its children, and a
// parent that comes back finds them.
func TestParentsEndWithoutTheirChildren(t *testing.T) {
	h := newHarness(t)
	h.must(&RegisterJob{Job: batchJob("par", parameterized())})
	child := h.must(&DispatchJob{Namespace: DefaultNamespace, JobID: "par", EvalID: h.id()}).JobID
	res := h.must(&DeregisterJob{Namespace: DefaultNamespace, JobID: "par", EvalID: h.id()})
	if j := h.job("par"); res.EvalID != "" || j.Status != JobStatusDead || h.job(child).Status != JobStatusPending {
		t.Errorf("stopping gave %+v; parent %s, child %s", res, j.Status, h.job(child).Status)
	}
	h.must(&DeregisterJob{Namespace: DefaultNamespace, JobID: "par", Purge: true, EvalID: h.id()})
	h.job(child)
	h.must(&RegisterJob{Job: batchJob("par", parameterized())})
	if c := h.children("par"); c != (ChildrenSummary{Pending: 1}) {
		t.Errorf("the parent is back and counts %+v", c)
	}
	h.must(&DeregisterJob{Namespace: DefaultNamespace, JobID: child, Purge: true, EvalID: h.id()})
	if c := h.children("par"); c != (ChildrenSummary{Dead: 1}) {
		t.Errorf("a purged child is counted as %+v", c)
	}
}

func TestKindOfAJobStays(t *testing.T) {
	h := newHarness(t)
	h.must(&RegisterJob{Job: batchJob("plain"), EvalID: h.id()})
	h.must(&RegisterJob{Job: batchJob("par", parameterized())})
	h.must(&RegisterJob{Job: batchJob("per", periodic)})
	child := h.must(&DispatchJob{Namespace: DefaultNamespace, JobID: "par", EvalID: h.id()}).JobID
	for _, test := range []struct {
		job  *Job
		want string
	}{
		{batchJob("plain", periodic), "periodic"},
		{batchJob("plain", parameterized()), "parameterized"},
		{batchJob("par"), "parameterized"},
		{batchJob("per"), "periodic"},
		{batchJob(child), `child of job "par"`},
	} {
		if res := h.do(&RegisterJob{Job: test.job, EvalID: h.id()}); CodeOf(res.Err) != CodeInvalid || !strings.Contains(res.Err.Text, test.want) {
			t.Errorf("%s: %v, want %s", test.job.ID, res.Err, test.want)
		}
	}
	more := Clone(h.job(child)) // scaling it
	more.TaskGroups[0].Count = 2
	if res := h.must(&RegisterJob{Job: more, EvalID: h.id()}); res.Version != 1 || res.EvalID == "" {
		t.Errorf("a child of another count: %+v", res)
	}
	if c := h.children("par"); c != (ChildrenSummary{Pending: 1}) {
		t.Errorf("its parent counts %+v", c)
	}
}

func TestLaunch(t *testing.T) {
	h := newHarness(t)
	key := JobKey{DefaultNamespace, "per"}
	last := func() int64 { return h.Snapshot().Launch(nil, key).Launch }
	launch := func(at int64) Result {
		return h.must(&LaunchJob{Namespace: key.Namespace, JobID: key.ID, At: at, EvalID: h.id()})
	}
	none := func(what string, res Result) {
		t.Helper()
		if res.JobID != "" || res.EvalID != "" {
			t.Errorf("%s launched %+v", what, res)
		}
	}
	h.must(&RegisterJob{Job: batchJob("per", periodic), EvalID: h.id()})
	registered := h.now
	if j := h.job("per"); last() != registered || j.Status != JobStatusRunning || len(h.Snapshot().LaunchingJobs(nil)) != 1 {
		t.Fatalf("registered at %d, its times count from %d, and it is %s", registered, last(), j.Status)
	}
	none("a time before it was registered", launch(registered))

	at := registered + int64(time.Hour)
	res := launch(at)
	child := h.job(res.JobID)
	if child.ID != fmt.Sprintf("per/periodic-%d", at/int64(time.Second)) || child.ParentID != "per" || child.Periodic != nil || child.Dispatched || child.Spawns() {
		t.Errorf("child %+v", child)
	}
	if e := h.Snapshot().Eval(nil, res.EvalID); e == nil || e.JobID != child.ID || e.TriggeredBy != TriggerPeriodicJob {
		t.Errorf("evaluation %+v", e)
	}
	none("the same time again", launch(at))
	none("an earlier time", launch(at-1))
	if last() != at || h.children("per") != (ChildrenSummary{Pending: 1}) {
		t.Errorf("launched at %d; children %+v", last(), h.children("per"))
	}

	h.must(&RegisterJob{Job: batchJob("per", periodic, func(j *Job) { j.TaskGroups[0].Count = 2 })})
	if last() != at {
		t.Errorf("another count moved the launches from %d to %d", at, last())
	}
	careful := batchJob("per", periodic, func(j *Job) { j.Periodic.ProhibitOverlap = true })
	h.must(&RegisterJob{Job: careful})
	if last() != h.now {
		t.Errorf("other times count from %d, want from now, %d", last(), h.now)
	}
	at += 2 * int64(time.Hour)
	none("a time at which a child runs", launch(at))
	if last() != at {
		t.Errorf("the time that passed is not counted: %d", last())
	}
	by := launch(0)
	if forced := h.job(by.JobID); forced.ID != fmt.Sprintf("per/periodic-%d", h.now/int64(time.Second)) || last() != at || by.EvalID == "" {
		t.Errorf("by hand: %+v; the last is %d, want %d", by, last(), at)
	}
	if again := launch(0); again.JobID == by.JobID || again.EvalID == "" {
		t.Errorf("a second later by hand: %+v", again)
	}
	h.now -= 2 * int64(time.Second)
	if again := launch(0); again.JobID != by.JobID || again.EvalID == "" || again.EvalID == by.EvalID {
		t.Errorf("twice by hand in a second: %+v, want a new evaluation of %s", again, by.JobID)
	}
	for _, c := range h.Snapshot().Children(nil, key) {
		h.end(c.ID)
	}
	if res := launch(at + int64(time.Hour)); res.JobID == "" {
		t.Error("nothing runs, and a time was let pass")
	}
}

func TestLaunchIsRefused(t *testing.T) {
	h := newHarness(t)
	h.must(&RegisterJob{Job: batchJob("off", periodic, func(j *Job) { j.Periodic.Enabled = false })})
	h.must(&RegisterJob{Job: batchJob("both", periodic, parameterized())})
	h.must(&RegisterJob{Job: batchJob("plain"), EvalID: h.id()})
	h.must(&RegisterJob{Job: batchJob("over", periodic)})
	h.must(&DeregisterJob{Namespace: DefaultNamespace, JobID: "over"})
	if jobs := h.Snapshot().LaunchingJobs(nil); len(jobs) > 0 {
		t.Errorf("to be launched: %+v", jobs)
	}
	for id, want := range map[string]string{"off": "not enabled", "both": "parameterized", "plain": "not a periodic", "over": "stopped", "nobody": "not found"} {
		for _, at := range []int64{0, h.now * 2} {
			if res := h.do(&LaunchJob{Namespace: DefaultNamespace, JobID: id, At: at, EvalID: h.id()}); res.Err == nil || !strings.Contains(res.Err.Text, want) {
				t.Errorf("%s at %d: %v, want %s", id, at, res.Err, want)
			}
		}
	}
	h.must(&RegisterJob{Job: batchJob("over", periodic)})
	if l := h.Snapshot().Launch(nil, JobKey{DefaultNamespace, "over"}); l.Launch != h.now {
		t.Errorf("started again at %d, its times count from %d", h.now, l.Launch)
	}
	h.must(&DeregisterJob{Namespace: DefaultNamespace, JobID: "over", Purge: true})
	if l := h.Snapshot().Launch(nil, JobKey{DefaultNamespace, "over"}); l != nil {
		t.Errorf("a purged job leaves %+v", l)
	}
}

// TestDispatchedPeriodicJob: what is dispatched from a job that is both has times of its own,
// and gives its payload and meta to what is launched.
func TestDispatchedPeriodicJob(t *testing.T) {
	h := newHarness(t)
	h.must(&RegisterJob{Job: batchJob("both", periodic, parameterized())})
	res := h.must(&DispatchJob{Namespace: DefaultNamespace, JobID: "both", Payload: []byte("p"), Meta: map[string]string{"color": "red"}, IdempotencyToken: "t", EvalID: h.id()})
	middle := h.job(res.JobID)
	if res.EvalID != "" || middle.Status != JobStatusRunning || h.children("both") != (ChildrenSummary{Running: 1}) || h.Snapshot().Launch(nil, middle.Key()) == nil {
		t.Fatalf("dispatched %+v: %+v", res, middle)
	}
	if jobs := h.Snapshot().LaunchingJobs(nil); len(jobs) != 1 || jobs[0].ID != middle.ID {
		t.Fatalf("to be launched: %+v", jobs)
	}
	launched := h.must(&LaunchJob{Namespace: DefaultNamespace, JobID: middle.ID, At: h.now + int64(time.Hour), EvalID: h.id()})
	leaf := h.job(launched.JobID)
	if leaf.ParentID != middle.ID || string(leaf.Payload) != "p" || leaf.Meta["color"] != "red" || leaf.DispatchIdempotencyToken != "" || leaf.Spawns() || launched.EvalID == "" {
		t.Errorf("launched %+v: %+v", launched, leaf)
	}
	if direct := h.Snapshot().Children(nil, JobKey{DefaultNamespace, "both"}); len(direct) != 1 {
		t.Errorf("%d children of the first, want 1", len(direct))
	}
}

// TestChildrenKeepTheModelOfTheirParent: an alias that moves changes the parent, whose later children have the new version.
func TestChildrenKeepTheModelOfTheirParent(t *testing.T) {
	h := newHarness(t)
	for _, c := range []string{"a", "b"} {
		h.must(&CreateModelVersion{Version: &ModelVersion{Model: "m", Digest: "sha256:" + strings.Repeat(c, 64)}})
	}
	h.must(&SetAlias{Model: "m", Alias: "production", Version: 1})
	parent := batchJob("par", parameterized())
	parent.TaskGroups[0].Tasks[0].Model = &ModelRef{Reference: "m@production", Name: "m", Alias: "production"}
	h.must(&RegisterJob{Job: parent})
	first := h.must(&DispatchJob{Namespace: DefaultNamespace, JobID: "par", EvalID: h.id()}).JobID
	h.must(&SetAlias{Model: "m", Alias: "production", Version: 2})
	second := h.must(&DispatchJob{Namespace: DefaultNamespace, JobID: "par", EvalID: h.id()}).JobID
	for id, want := range map[string]uint64{"par": 2, first: 1, second: 2} {
		if j := h.job(id); j.TaskGroups[0].Tasks[0].Model.Version != want {
			t.Errorf("job %s has version %d of the model, want %d", id, j.TaskGroups[0].Tasks[0].Model.Version, want)
		}
	}
	if evals := h.Snapshot().EvalsByJob(nil, JobKey{DefaultNamespace, "par"}); len(evals) > 0 {
		t.Errorf("the moved alias evaluates the parent: %+v", evals)
	}
}

// TestOlderServersStopAtJobsWithChildren: such jobs are not proposed while an older server is
// there, and where one is written all the same it names the rules that it needs.
func TestOlderServersStopAtJobsWithChildren(t *testing.T) {
	h := newHarness(t)
	commands := []Command{
		&RegisterJob{Job: batchJob("a", periodic)}, &RegisterJob{Job: batchJob("a", parameterized())},
		&RegisterJob{Job: batchJob("a", func(j *Job) { j.TaskGroups[0].Tasks[0].DispatchPayload = &DispatchPayloadConfig{File: "x"} })},
		&DispatchJob{JobID: "a"}, &LaunchJob{JobID: "a"},
	}
	plain := &RegisterJob{Job: batchJob("a")}
	server := func(id string, rules uint64) {
		h.must(&RegisterServer{Server: &Server{ID: id, Name: "server-" + id, RaftAddr: id + ":1", Rules: rules}})
	}
	check := func(old string) {
		t.Helper()
		for _, c := range append(commands, plain) {
			err := h.Snapshot().Supports(c)
			if wants := old != "" && c != plain; (err != nil) != wants || wants && (!strings.Contains(err.Error(), old) || CodeOf(err) != CodeUnsupported) {
				t.Errorf("%T: %v", c, err)
			}
		}
	}
	check("")
	server("new", CurrentRules)
	check("")
	server("old", rulesSparse)
	check("upgrade server-old first")
	for _, c := range append(commands, plain) {
		entry := h.Snapshot().EncodeCommand(c)
		back, err := DecodeCommand(entry)
		if err != nil {
			t.Fatal(err)
		}
		if want := map[bool]uint64{true: rulesSparse, false: rulesChildren}[c == plain]; back.stamp().Rules != want {
			t.Errorf("%T is written by rules %d, want %d", c, back.stamp().Rules, want)
		}
	}
	h.must(&RemoveServer{ID: "old", Left: true})
	check("")
}

// TestWatchesOfLaunches wakes who waits for the jobs to launch, and not for others.
func TestWatchesOfLaunches(t *testing.T) {
	h := newHarness(t)
	fires := func(c Command) bool {
		t.Helper()
		ws := make(WatchSet)
		h.Snapshot().LaunchingJobs(ws)
		h.must(c)
		for ch := range ws {
			select {
			case <-ch:
				return true
			default:
			}
		}
		return false
	}
	for i, step := range []struct {
		c    Command
		want bool
	}{
		{&RegisterJob{Job: batchJob("plain"), EvalID: h.id()}, false},
		{&RegisterJob{Job: batchJob("both", periodic, parameterized())}, false},
		{&RegisterJob{Job: batchJob("per", periodic)}, true},
		{&LaunchJob{Namespace: DefaultNamespace, JobID: "per", EvalID: h.id()}, false},
		{&DispatchJob{Namespace: DefaultNamespace, JobID: "both", EvalID: h.id()}, true},
		{&DeregisterJob{Namespace: DefaultNamespace, JobID: "per"}, true},
	} {
		if got := fires(step.c); got != step.want {
			t.Errorf("step %d, %T: woken %v, want %v", i, step.c, got, step.want)
		}
	}
}

// randomChild registers, ends, dispatches and launches a few parents and their children.
func randomChild(h *harness, r *rand.Rand) Command {
	id := fmt.Sprintf("parent-%d", r.IntN(3))
	snap := h.Snapshot()
	if children := snap.Children(nil, JobKey{DefaultNamespace, id}); len(children) > 0 && r.IntN(2) == 0 {
		j := children[r.IntN(len(children))]
		switch r.IntN(4) {
		case 0:
			return &Reap{Jobs: []JobKey{j.Key()}}
		case 1:
			return &DeregisterJob{Namespace: j.Namespace, JobID: j.ID, Purge: r.IntN(2) == 0, EvalID: h.id()}
		case 2:
			evals := []*Evaluation{}
			for _, e := range snap.OpenEvalsByJob(j.Key()) {
				evals = append(evals, answered(e))
			}
			return &UpdateEvals{Evals: evals}
		default:
			if j.Spawns() {
				id = j.ID
			}
		}
	}
	switch r.IntN(5) {
	case 0:
		j := batchJob(id)
		if id != "parent-0" {
			periodic(j)
			j.Periodic.ProhibitOverlap = r.IntN(2) == 0
		}
		if id != "parent-1" {
			parameterized()(j)
		}
		return &RegisterJob{Job: j}
	case 1:
		return &DeregisterJob{Namespace: DefaultNamespace, JobID: id, Purge: r.IntN(2) == 0}
	case 2:
		return &DispatchJob{Namespace: DefaultNamespace, JobID: id, IdempotencyToken: []string{"", "a", "b"}[r.IntN(3)], EvalID: h.id()}
	default:
		return &LaunchJob{Namespace: DefaultNamespace, JobID: id, At: int64(r.IntN(2)) * (h.now + r.Int64N(int64(time.Minute))), EvalID: h.id()}
	}
}

// BenchmarkDispatch applies dispatches of one job, each with a token of its own: what one costs
// must not grow with those before.
func BenchmarkDispatch(b *testing.B) {
	s, index := NewState(), uint64(0)
	apply := func(c Command) {
		index++
		*c.stamp() = Stamp{RequestID: fmt.Sprintf("%08d", index), Time: int64(index) * int64(time.Millisecond)}
		if res, err := s.Apply(index, EncodeCommand(c)); err != nil || res.Err != nil {
			b.Fatal(err, res.Err)
		}
	}
	apply(&RegisterJob{Job: batchJob("par", parameterized("who"))})
	for b.Loop() {
		n := fmt.Sprint(index)
		apply(&DispatchJob{Namespace: DefaultNamespace, JobID: "par", Payload: []byte(n), Meta: map[string]string{"who": n}, IdempotencyToken: n, EvalID: n})
	}
	b.ReportMetric(float64(index), "children")
}
