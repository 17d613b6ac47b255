package sim

import "time"

// Totals sums runs up.
type Totals struct {
	Runs     int
	Commands int
	Applied  int
	Steps    uint64
	Virtual  time.Duration
	Coverage Coverage
}

func (t *Totals) add(r *Report) {
	t.Runs++
	t.Commands += r.Commands
	t.Applied += r.Applied
	t.Steps += r.Steps
	t.Virtual += r.Virtual
	t.Coverage.Add(r.Coverage)
}

// Series runs cfg with one seed after the other, from cfg.Seed up, for as long as
// more says so, which it is asked after each. It ends with the first *Failure.
func Series(cfg Config, more func(Totals) bool) (Totals, error) {
	t := Totals{Coverage: newCoverage()}
	for ; ; cfg.Seed++ {
		r, err := Run(cfg)
		if r != nil {
			t.add(r)
		}
		if err != nil || !more(t) {
			return t, err
		}
	}
}
