package scheduler

import (
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// policyOf scales by requests in flight, eight for each allocation.
func policyOf(min, max int64) *cluster.ScalingPolicy {
	return &cluster.ScalingPolicy{
		Type: cluster.ScalingHorizontal, Min: min, Max: max, Enabled: true, Cooldown: 30 * time.Second, Window: 5 * time.Minute,
		Checks: []*cluster.ScalingCheck{{Name: "load", Query: cluster.MetricInFlight, Window: time.Minute, Target: 8000, Tolerance: 100}},
	}
}

// driven lets decisions follow each other as an autoscaler's do.
type driven struct {
	observed
	m       scaled
	changes int
}

func (d *driven) step(value float64, known bool) decision {
	d.values, d.running = []measured{{}}, d.count
	if known {
		d.values[0] = measured{sum: value * float64(d.count), told: d.count}
	}
	return d.next()
}

func (d *driven) next() decision {
	out := decide(&d.m, d.observed)
	if out.count != d.count {
		d.count, d.changed, d.grew = out.count, d.now, out.count > d.count
		d.changes++
	}
	d.now = d.now.Add(scaleEvery)
	return out
}

func TestAutoscaling(t *testing.T) {
	start := cluster.TimeOf(time.Unix(1_700_000_000, 0))
	begin := func(policy *cluster.ScalingPolicy, count int) *driven {
		return &driven{observed: observed{policy: policy, count: count, now: start, began: start.Add(-time.Hour)}}
	}
	d := begin(policyOf(1, 20), 4)
	if out := d.step(16, true); out.count != 8 || out.state != cluster.ScalingChanged || !strings.Contains(out.reason, "in_flight is 16 per allocation, its target 8") {
		t.Errorf("twice the target: %+v", out)
	}
	if out := d.step(16, true); out.count != 8 || out.state != cluster.ScalingHeld {
		t.Errorf("within the cooldown: %+v", out)
	}
	d.now = d.now.Add(time.Minute)
	if out := d.step(80, true); out.count != 20 {
		t.Errorf("the bound: %+v", out)
	}
	// The load is gone: only after the whole window does the count follow, to the most that was wanted in it.
	quiet := d.now
	for d.count == 20 && d.now < quiet.Add(time.Hour) {
		d.step(1, true)
	}
	if waited := d.now.Std().Sub(quiet.Std()); waited < 5*time.Minute || waited > 6*time.Minute || d.count != 3 {
		t.Errorf("down to %d after %s", d.count, waited)
	}

	d = begin(policyOf(1, 20), 4)
	if out := d.step(8.7, true); out.count != 4 || out.state != cluster.ScalingSteady {
		t.Errorf("within the tolerance: %+v", out)
	}
	d = begin(policyOf(1, 20), 4)
	d.began = d.now // a new leader
	for range 100 {
		if d.step(0, true); d.count != 4 {
			t.Fatal("a leader that has not seen a window scales down")
		}
	}
	if d.step(16, true); d.count != 8 {
		t.Error("a new leader does not scale up")
	}
	d = begin(policyOf(0, 20), 4)
	for range 1000 {
		if out := d.step(0, false); out.count != 4 || out.state != cluster.ScalingMissing || !strings.Contains(out.reason, "nothing has told of in_flight") {
			t.Fatalf("without a metric: %+v", out)
		}
	}
	d = begin(policyOf(0, 20), 2)
	d.deploying = true
	for range 1000 {
		if d.step(0, true); d.count != 2 {
			t.Fatal("scaled down during a deployment")
		}
	}
	d.deploying = false
	if d.step(0, true); d.count != 0 {
		t.Errorf("idle: %d", d.count)
	}
	d.now = d.now.Add(time.Hour)
	if out := d.step(0, false); out.count != 0 || out.state != cluster.ScalingSteady {
		t.Errorf("asleep: %+v", out)
	}
	d.held = 1
	if out := d.step(0, false); out.count != 1 || out.reason != "requests wait for a replica" {
		t.Errorf("somebody waits: %+v", out)
	}
	p := policyOf(1, 20)
	p.Checks[0].MaxUp = 2
	if d = begin(p, 4); d.step(100, true).count != 6 {
		t.Errorf("max_scale_up: %d", d.count)
	}

	d = begin(policyOf(1, 20), 4)
	d.deploying = true
	if out := d.step(16, true); out.count != 4 || out.state != cluster.ScalingHeld || !strings.Contains(out.reason, "the change to 8 waits for a deployment of the job") {
		t.Errorf("during a deployment: %+v", out)
	}
	p = policyOf(1, 20)
	p.CooldownUp = 4 * time.Second
	d = begin(p, 4)
	d.step(16, true)
	if d.step(16, true); d.count != 8 {
		t.Errorf("cooldown_on_scale_up does not hold: %d", d.count)
	}
	if d.step(16, true); d.count != 16 {
		t.Errorf("cooldown_on_scale_up has passed: %d", d.count)
	}
}

// TestAutoscalingOfPartsUnknown: allocations that tell nothing are no reason for more, nor for less.
func TestAutoscalingOfPartsUnknown(t *testing.T) {
	c := policyOf(0, 100).Checks[0] // 8 for each
	for _, x := range []struct {
		what  string
		count int
		sum   float64
		told  int
		want  int
	}{
		{"all tell", 4, 64, 4, 8},
		{"one of four runs, at twice its target", 4, 16, 1, 4},
		{"one of four runs, and has more than all should", 4, 80, 1, 10},
		{"half cannot be heard, the others idle", 4, 0, 2, 2},
		{"one cannot be heard, the others at their targets", 4, 24, 3, 4},
		{"an old one is still there", 4, 40, 5, 4},
		{"rounding", 3, 24.1, 3, 3},
		{"idle", 5, 0, 5, 0},
	} {
		if got := recommend(c, x.count, measured{sum: x.sum, told: x.told}); got != x.want {
			t.Errorf("%s: %d, want %d", x.what, got, x.want)
		}
	}
	// What has no room does not ask for ever more.
	start := cluster.TimeOf(time.Unix(1_700_000_000, 0))
	d := &driven{observed: observed{policy: policyOf(1, 100), count: 4, now: start, began: start.Add(-time.Hour)}}
	for range 1000 {
		d.values, d.running = []measured{{sum: 3 * 16, told: 3}}, 3 // three have room, at twice their target
		d.next()
	}
	if d.count != 6 {
		t.Errorf("three of four run at twice their target: count %d", d.count)
	}
	// What has just been asked for is awaited.
	d = &driven{observed: observed{policy: policyOf(0, 100), count: 1, now: start, began: start.Add(-time.Hour), values: []measured{{}}}}
	for range 1000 {
		if out := d.next(); out.count != 1 || out.state != cluster.ScalingHeld || !strings.Contains(out.reason, "none of 1 allocations runs yet") {
			t.Fatalf("while the first starts: %+v", out)
		}
	}
}

// TestAutoscalingBounds feeds anything: counts stay within the bounds; what is missing, or a deployment, lets nothing go; and a
// group with requests does not go to sleep.
func TestAutoscalingBounds(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 2))
		p := policyOf(int64(r.IntN(3)), int64(3+r.IntN(20)))
		p.Checks = append(p.Checks,
			&cluster.ScalingCheck{Name: "held", Query: cluster.MetricHeld, Window: time.Minute, Target: int64(1 + r.IntN(9000)), Tolerance: 100},
			&cluster.ScalingCheck{Name: "day", Start: "0 8 * * *", Duration: time.Hour, Count: 1 + r.IntN(30)})
		p.Window, p.Cooldown = time.Duration(r.IntN(60))*time.Second, time.Duration(r.IntN(20))*time.Second
		d := &driven{observed: observed{policy: p, count: int(p.Min), now: cluster.TimeOf(time.Unix(1_700_000_000, 0))}}
		for range 500 {
			before := d.count
			d.running = r.IntN(before + 2)
			d.deploying, d.busy, d.held = r.IntN(5) == 0, r.IntN(4) == 0, float64(max(0, r.IntN(8)-5))
			known := r.IntN(4) > 0
			d.values = []measured{{}, {sum: d.held, told: max(before, 1)}, {active: r.IntN(4) == 0}}
			if known && d.running > 0 {
				d.values[0] = measured{sum: 40 * r.Float64(), told: 1 + r.IntN(d.running)}
			}
			missing := d.values[0].told == 0
			out := d.next()
			switch {
			case out.count < int(p.Min) || out.count > int(p.Max):
				t.Fatalf("seed %d: count %d is not within %d and %d", seed, out.count, p.Min, p.Max)
			case out.count < before && (missing || d.deploying):
				t.Fatalf("seed %d: from %d to %d while metrics are missing (%v) or a deployment runs (%v)", seed, before, out.count, missing, d.deploying)
			case out.count == 0 && before > 0 && (d.busy || d.held > 0):
				t.Fatalf("seed %d: it goes to sleep with requests", seed)
			case missing && before > 0 && d.running > 0 && out.state == cluster.ScalingSteady:
				t.Fatalf("seed %d: a missing metric is told as healthy: %+v", seed, out)
			case (out.state == cluster.ScalingChanged) != (out.count != before):
				t.Fatalf("seed %d: from %d: %+v", seed, before, out)
			}
		}
	}
}

func TestAutoscalingByTimes(t *testing.T) {
	eight := time.Date(2026, 3, 2, 8, 0, 0, 0, time.UTC) // a Monday
	c := &cluster.ScalingCheck{Name: "day", Start: "0 8 * * 1-5", Duration: 10 * time.Hour, Count: 6}
	for at, want := range map[time.Duration]bool{-time.Second: false, 0: true, 9*time.Hour + 59*time.Minute: true, 10*time.Hour + time.Second: false, -48 * time.Hour: false} {
		if got := runsAt(c, cluster.TimeOf(eight.Add(at))); got != want {
			t.Errorf("%s after eight it runs: %v", at, got)
		}
	}
	p := policyOf(1, 20)
	p.Checks = append(p.Checks, c)
	o := observed{policy: p, count: 2, now: cluster.TimeOf(eight), values: []measured{{sum: 16, told: 2}, {active: true}}}
	if d := decide(&scaled{}, o); d.count != 6 || d.check != "day" {
		t.Errorf("while the schedule runs: %+v", d)
	}
}

// TestAutoscalingIsCalm feeds noise: the count stays within the bounds, and does not go up and down with a load that stays.
func TestAutoscalingIsCalm(t *testing.T) {
	for seed := range uint64(50) {
		r := rand.New(rand.NewPCG(seed, 1))
		d := &driven{observed: observed{policy: policyOf(2, 30), count: 5, now: 1, began: -cluster.Time(time.Hour)}}
		total := 8 * (3 + 20*r.Float64()) // what all have in flight
		for i := range 3000 {
			d.step(total*(0.8+0.4*r.Float64())/float64(d.count), r.IntN(10) > 0)
			if d.count < 2 || d.count > 30 {
				t.Fatalf("seed %d: count %d", seed, d.count)
			}
			if i == 600 { // twenty minutes: it knows the load
				d.changes = 0
			}
		}
		if d.changes > 3 {
			t.Errorf("seed %d: a load that stays changes the count %d times in 80 minutes", seed, d.changes)
		}
	}
}

// told is what tests say was measured.
type told struct {
	mu     sync.Mutex
	values map[[2]string]float64
}

func (m *told) Mean(of, metric string, _ time.Duration) (float64, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	v, ok := m.values[[2]string{of, metric}]
	return v, ok
}

func (m *told) Latest(of, metric string, age time.Duration) (float64, bool) {
	return m.Mean(of, metric, age)
}

// TestAutoscalerActs has the autoscaler change a count in a store, and tell of a metric that is missing, once.
func TestAutoscalerActs(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		job := service("web", 2)
		job.TaskGroups[0].Update = nil
		job.TaskGroups[0].Scaling = policyOf(1, 10)
		w.run(job)
		snap := w.agents()
		measured := &told{values: map[[2]string]float64{}}
		s, err := New(Config{Store: w.memStore, Logger: testLogger(t), Metrics: measured})
		if err != nil {
			t.Fatal(err)
		}
		start := now()
		a := &autoscaler{Scheduler: s, began: start.Add(-time.Hour), groups: map[string]*scaled{}}
		events := func() []*cluster.ScalingEvent {
			h := w.State().Snapshot().Scaling(nil, job.Key())
			if h == nil {
				return nil
			}
			return h.Groups["g"].Events
		}
		a.look(t.Context(), w.State().Snapshot(), start)
		id := cluster.ScalingPolicyID(job.Key(), "g")
		if x, err := s.ScalingStatus(id); err != nil || x.State != cluster.ScalingMissing || x.Count != 2 {
			t.Errorf("status %+v, error %v", x, err)
		}
		if e := events(); len(e) != 0 {
			t.Errorf("what began just now is told as missing: %+v", e)
		}
		for i := range 3 {
			a.look(t.Context(), w.State().Snapshot(), start.Add(time.Minute+time.Duration(i)*scaleEvery))
		}
		if e := events(); len(e) != 1 || !e[0].Error || e[0].Count != nil || e[0].Message != "check load: nothing has told of in_flight in the last 1m0s" {
			t.Fatalf("a metric is missing: %+v", e)
		}
		for _, x := range w.wantLive(snap, "web", 2) {
			measured.values[[2]string{x.ID, cluster.MetricInFlight}] = 20
		}
		a.look(t.Context(), w.State().Snapshot(), start)
		if e := events(); len(e) != 2 || *e[0].Count != 5 || e[0].PreviousCount != 2 {
			t.Fatalf("twenty in flight at each of two: %+v", e)
		}
		w.wantLive(w.agents(), "web", 5)
		if x, err := s.ScalingStatus(id); err != nil || x.State != cluster.ScalingChanged || x.Count != 5 || x.Check != "load" {
			t.Errorf("status %+v, error %v", x, err)
		}

		// What the rules refuse is tried again later, not at each look.
		for _, x := range w.wantLive(w.agents(), "web", 5) {
			measured.values[[2]string{x.ID, cluster.MetricInFlight}] = 20
		}
		tried := 0
		w.before = func(c cluster.Command) error {
			if _, ok := c.(*cluster.ScaleJob); ok {
				tried++
				return cluster.Errorf(cluster.CodeInvalid, "not now")
			}
			return nil
		}
		later := now().Add(time.Hour)
		for at := later; at < later.Add(retryScale); at = at.Add(scaleEvery) {
			a.look(t.Context(), w.State().Snapshot(), at)
		}
		if x, err := s.ScalingStatus(id); err != nil || tried != 1 || x.State != cluster.ScalingHeld || x.Count != 5 || !strings.Contains(x.Reason, "was refused: not now") {
			t.Errorf("tried %d times, status %+v, error %v", tried, x, err)
		}
		w.before = nil
		if a.look(t.Context(), w.State().Snapshot(), later.Add(retryScale)); *events()[0].Count != 10 {
			t.Errorf("when it may be tried again: %+v", events()[0])
		}

		// A group without allocations is woken by a request that waits for its model.
		asleep := service("asleep", 0)
		asleep.TaskGroups[0].Update, asleep.TaskGroups[0].Scaling = nil, policyOf(0, 3)
		asleep.TaskGroups[0].Tasks[0].Model = &cluster.ModelRef{Name: "m", Version: 1}
		if d := decide(&scaled{}, a.gather(w.State().Snapshot(), asleep, asleep.TaskGroups[0], start)); d.count != 0 {
			t.Errorf("nobody asks: %+v", d)
		}
		measured.values[[2]string{"m", cluster.MetricHeld}] = 1
		if d := decide(&scaled{}, a.gather(w.State().Snapshot(), asleep, asleep.TaskGroups[0], start)); d.count != 1 {
			t.Errorf("somebody waits: %+v", d)
		}
	})
}

// TestPending adds up what waits for room.
func TestPending(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 1)
		w.run(service("train", 3, batch, gpus(1)))
		snap := w.agents()
		w.wantLive(snap, "train", 1)
		got := pendingOf(w.State().Snapshot())
		task := snap.Job(nil, cluster.JobKey{Namespace: "default", ID: "train"}).TaskGroups[0].Tasks[0].Resources
		for k, want := range map[string]int64{pendingAllocs: 2, pendingCPU: 2 * int64(task.CPU), pendingMemory: 2 * int64(task.MemoryMB), "nvidia/gpu": 2000} {
			if got[pendingKey{cluster.DefaultNodePool, k}] != want {
				t.Errorf("%s: %d waits, want %d", k, got[pendingKey{cluster.DefaultNodePool, k}], want)
			}
		}
	})
}
