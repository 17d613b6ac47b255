package sim

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"testing"
	"time"
)

// smallTrace draws a cluster of a few nodes and pods of all classes.
func smallTrace(seed uint64) *Trace {
	rnd := rand.New(rand.NewPCG(seed, 0x7ace))
	t := &Trace{}
	for i := range 12 {
		n := TraceNode{Name: fmt.Sprintf("n%02d", i), CPU: 96_000, Memory: 384_000, GPUs: 8, Model: "A"}
		if i%3 == 0 {
			n.GPUs, n.Model = 4, "B"
		}
		t.Nodes = append(t.Nodes, n)
	}
	for i := range 120 {
		p := TracePod{Name: fmt.Sprintf("p%03d", i), CPU: 4000, Memory: 8192, GPUs: 1, Milli: 1000, QoS: []string{"LS", "BE", "BE", "Burstable"}[i%4]}
		switch draw := rnd.IntN(10); {
		case draw < 3:
			p.Milli = int64(100 * (1 + rnd.IntN(9)))
		case draw < 4:
			p.GPUs = 4
		case draw < 5:
			p.GPUs, p.Milli = 0, 0
		}
		p.Created = rnd.Int64N(86_400)
		p.Deleted = p.Created + 60 + rnd.Int64N(3600)
		t.Pods = append(t.Pods, p)
	}
	return t
}

// TestDay: in a day of a busy region nobody is starved, no gang is halved, no quota exceeded, all work ends,
// and checkpoints bound what preemption costs. The same seed gives the same day.
func TestDay(t *testing.T) {
	t.Parallel()
	const seed = 446960269 // a busy day; what is lost, and got, differs by the day
	trace := smallTrace(seed)
	run := func(cfg DayConfig) *DayReport {
		cfg.Seed, cfg.Jobs, cfg.Load, cfg.Gangs, cfg.Tick = seed, 250, 90, 4, 2*time.Minute
		r, err := trace.Day(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range r.Faults {
			t.Error(f)
		}
		return r
	}
	saving := DayConfig{Checkpoint: 10 * time.Minute}
	r := run(saving)
	t.Logf("%d jobs, %d gangs: %.1f %% allocated, %d preemptions, %.2f %% lost, Jain %.3f, waits %+v", r.Submitted, r.Gangs, r.Allocated, r.Preempted, r.Lost, r.Jain, r.Classes)
	if again := run(saving); !reflect.DeepEqual(r, again) {
		t.Error("the same seed gave another day")
	}
	if r.Preempted == 0 || r.Gangs == 0 {
		t.Errorf("%d preemptions and %d gangs: the day tests nothing", r.Preempted, r.Gangs)
	}
	if r.Lost > 5 { // each preemption costs what runs between two checkpoints, and in so small a region there are many
		t.Errorf("%.2f %% of the work was lost", r.Lost)
	}
	for _, tenant := range r.Tenants {
		if due := min(tenant.Asked, tenant.Entitled); tenant.Ended < tenant.Jobs || tenant.Got < 0.7*due {
			t.Errorf("%+v: starved", tenant)
		}
	}
	if plain := run(DayConfig{Plain: true}); plain.Preempted > 0 {
		t.Errorf("%d preemptions where there are to be none", plain.Preempted)
	}
}
