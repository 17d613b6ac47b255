package scheduler

import (
	"fmt"
	"testing"

	"github.com/rxvision/rxvision/cluster"
)

// BenchmarkBlocked ends one allocation of a full cluster in which 10,000 jobs wait, and plans until nothing is left to do: all
// that wait are looked at again.
func BenchmarkBlocked(b *testing.B) {
	const nodes, waiting = 100, 10_000
	s := newMemStore(b)
	s.check = false
	for i := range nodes {
		s.node(fmt.Sprintf("n%03d", i), 0)
	}
	steps := NewSteps(Retention{}, newID)
	plan := func() {
		for {
			batch, _ := steps.Plan(s.State().Snapshot(), now(), maxBatch)
			if batch == nil {
				return
			}
			res := s.must(batch.Command())
			for _, cmd := range batch.Settle(res, nil, now()) {
				s.must(cmd)
			}
		}
	}
	for i := range nodes*10 + waiting {
		s.run(service(fmt.Sprintf("job%05d", i), 1, batch))
	}
	plan()
	var running []*cluster.Allocation
	for b.Loop() {
		if len(running) == 0 {
			b.StopTimer()
			for _, a := range s.State().Snapshot().Allocs(nil, "") {
				if !a.ClientTerminal() {
					running = append(running, a)
				}
			}
			b.StartTimer()
		}
		s.say(running[0], cluster.AllocClientComplete, true)
		running = running[1:]
		plan()
	}
}
