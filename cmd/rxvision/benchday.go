package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/rxvision/rxvision/sim"
)

type dayFlags struct {
	*benchFlags
	data, nodes, pods, list, json, plot string
	cfg                                 sim.DayConfig
}

func newBenchDay(b *benchFlags) *cobra.Command {
	d := dayFlags{benchFlags: b}
	cmd := &cobra.Command{
		Use:   "day",
		Short: "A day of a trace of a real cluster in virtual time: GPU use, waits, preemption, tenants",
		Long: `Submits a day of work made of a trace's pods to the real rules and the real scheduler, in
virtual time, with agents that run it. The same seed gives the same day.

Pods are drawn from the list by the seed and submitted at the time of day at which they were created; all
run times are stretched by one factor, up to 12 h, so that what is submitted asks for --load percent of the GPUs'
time. LS and Guaranteed pods serve: priority 70, and nothing preempts them. Burstable (50) and BE (30) may be
preempted after 5 minutes, with a grace of a minute. Pods fall to five namespaces by the hash of their names;
their quotas come to all GPUs, and they lend each other what they leave idle. Half of the pods
with several GPUs become gangs, and so do --gangs percent of the preemptible ones with one GPU.

The same day is run with checkpoints, without them, and plain: no tenants, no quotas, no preemption, by priority and
then the oldest first. Only time since the last checkpoint counts as lost; nothing is saved upon the notice.
The files have the columns of Alibaba's cluster-trace-gpu-v2023.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runBenchDay(cmd.Context(), d, cmd.OutOrStdout()) },
	}
	f := cmd.Flags()
	f.StringVar(&d.data, "data", "", "a folder with a list of nodes and lists of pods")
	f.StringVar(&d.list, "list", "default", "which list of pods of --data")
	f.StringVar(&d.nodes, "nodes", "", "the list of nodes")
	f.StringVar(&d.pods, "pods", "", "the list of pods")
	f.StringVar(&d.json, "json", "", "also write the course of each day to this JSON file")
	f.StringVar(&d.plot, "plot", "", "also draw the day to this SVG file")
	f.Uint64Var(&d.cfg.Seed, "seed", 42, "draws the day")
	f.IntVar(&d.cfg.Jobs, "jobs", 20_000, "jobs submitted in the day")
	f.IntVar(&d.cfg.Load, "load", 100, "percent of the GPUs' time that they ask for")
	f.IntVar(&d.cfg.Gangs, "gangs", 2, "percent of preemptible jobs with one GPU that become gangs; -1: no gangs at all")
	f.DurationVar(&d.cfg.Checkpoint, "checkpoint", 10*time.Minute, "between two checkpoints")
	f.DurationVar(&d.cfg.Tick, "tick", time.Minute, "in which agents report and the scheduler decides")
	return cmd
}

// dayRun is one way to run the day.
type dayRun struct {
	Name   string         `json:"name"`
	Took   float64        `json:"took_s"`
	Report *sim.DayReport `json:"day"`
}

func runBenchDay(ctx context.Context, d dayFlags, out io.Writer) error {
	switch {
	case d.data == "" && (d.nodes == "" || d.pods == ""):
		return errors.New("name a trace: --nodes FILE and --pods FILE, or --data DIR")
	case d.data != "" && (d.nodes != "" || d.pods != ""):
		return errors.New("--data stands for --nodes and --pods: use either")
	case d.cfg.Checkpoint <= 0:
		return errors.New("--checkpoint: must be longer than 0; the day is run without checkpoints besides")
	case d.data != "":
		nodes, lists, _, err := traceFolder(d.data)
		if err != nil {
			return err
		}
		if d.nodes, d.pods = nodes, lists[d.list]; d.pods == "" {
			return fmt.Errorf("--list %q: %s has no such list", d.list, d.data)
		}
	}
	trace, err := openTrace(d.nodes, d.pods)
	if err != nil {
		return err
	}
	if d.cfg.Gangs == 0 {
		d.cfg.Gangs = -1
	}
	runs := []*dayRun{{Name: "rxvision"}, {Name: "no checkpoints"}, {Name: "plain"}}
	progress := &bar{w: out, what: "day", amount: func(total int64) string { return fmt.Sprintf("of %d jobs", total) }}
	var mu sync.Mutex
	have := make([]int, len(runs))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for i, r := range runs {
		g.Go(func() error {
			cfg, start := d.cfg, time.Now()
			cfg.Progress = func(ended, jobs int) {
				mu.Lock()
				defer mu.Unlock()
				have[i] = ended
				done := 0
				for _, n := range have {
					done += n
				}
				progress.set(int64(done), int64(jobs*len(runs)))
			}
			if cfg.Plain = i == 2; i == 1 {
				cfg.Checkpoint = 0
			}
			var err error
			r.Report, err = trace.Day(ctx, cfg)
			r.Took = time.Since(start).Seconds()
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	printDay(out, runs)
	b := &benchRun{out: out, figures: dayFigures(runs)}
	if d.json != "" {
		text, err := json.MarshalIndent(runs, "", " ")
		if err != nil {
			return err
		}
		if err := writeBeside(d.json, text); err != nil {
			return err
		}
	}
	if d.plot != "" {
		if err := writeBeside(d.plot, drawDay(runs[0].Report, runs[2].Report)); err != nil {
			return err
		}
		fmt.Fprintln(out, "plot:", d.plot)
	}
	if err := b.write(*d.benchFlags); err != nil {
		return err
	}
	return errors.Join(append(append(runs[0].Report.Faults, runs[1].Report.Faults...), runs[2].Report.Faults...)...)
}

// writeBeside writes a file and the folders above it.
func writeBeside(path string, text []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}

func printDay(out io.Writer, runs []*dayRun) {
	first := runs[0].Report
	fmt.Fprintf(out, "%d jobs, %d of them gangs; they ask for %.1f %% of the GPUs' time, run times stretched by %.1f\n\n", first.Submitted, first.Gangs, first.Load, first.Stretch)
	row := func(what string, value func(*sim.DayReport) string) {
		fmt.Fprintf(out, "%-38s", what)
		for _, r := range runs {
			fmt.Fprintf(out, " %22s", value(r.Report))
		}
		fmt.Fprintln(out)
	}
	fmt.Fprintf(out, "%-38s", "")
	for _, r := range runs {
		fmt.Fprintf(out, " %22s", r.Name)
	}
	fmt.Fprintln(out)
	row("GPU time held in the day", func(r *sim.DayReport) string { return fmt.Sprintf("%.1f %%", r.Allocated) })
	row("… and not done anew", func(r *sim.DayReport) string { return fmt.Sprintf("%.1f %%", r.Useful) })
	row("work lost to preemption", func(r *sim.DayReport) string { return fmt.Sprintf("%.2f %%", r.Lost) })
	row("preemptions", func(r *sim.DayReport) string { return fmt.Sprint(r.Preempted) })
	waits := func(w sim.DayWaits) string {
		return fmt.Sprintf("%s / %s", shortTime(w.P50), shortTime(w.P99))
	}
	for c, name := range sim.DayClasses {
		row(fmt.Sprintf("wait of %s (%d jobs), p50 / p99", name, first.Classes[c].Jobs), func(r *sim.DayReport) string { return waits(r.Classes[c]) })
	}
	row("wait of gangs, p50 / p99", func(r *sim.DayReport) string { return waits(r.GangWaits) })
	row("fairness (Jain, 1 is best)", func(r *sim.DayReport) string { return fmt.Sprintf("%.3f", r.Jain) })
	row("all work ended after", func(r *sim.DayReport) string { return r.Ended.String() })
	for i, r := range runs {
		fmt.Fprintf(out, "\n%s, in %% of the GPU time (%.0f s, %d plans)\n%-12s %8s %10s %8s %14s\n", r.Name, r.Took, r.Report.Plans, "tenant", "asked", "entitled", "got", "longest wait")
		for _, t := range runs[i].Report.Tenants {
			fmt.Fprintf(out, "%-12s %8.1f %10.0f %8.1f %14s\n", t.Name, t.Asked, t.Entitled, t.Got, shortTime(t.Longest))
		}
	}
}

func shortTime(seconds float64) string {
	switch {
	case seconds < 120:
		return fmt.Sprintf("%.0f s", seconds)
	case seconds < 7200:
		return fmt.Sprintf("%.0f min", seconds/60)
	}
	return fmt.Sprintf("%.1f h", seconds/3600)
}

func dayFigures(runs []*dayRun) (all []figure) {
	us, bare, plain := runs[0].Report, runs[1].Report, runs[2].Report
	add := func(metric, unit, target string, of func(*sim.DayReport) float64) {
		all = append(all, figure{Metric: "day: " + metric, Value: of(us), Unit: unit, Peer: "plain", PeerValue: of(plain), Target: target})
	}
	add("GPU time held", "%", "", func(r *sim.DayReport) float64 { return r.Allocated })
	add("preemptions", "", "", func(r *sim.DayReport) float64 { return float64(r.Preempted) })
	add("fairness", "Jain", "", func(r *sim.DayReport) float64 { return r.Jain })
	for c, name := range sim.DayClasses {
		add("wait of "+name+", p50", "s", "", func(r *sim.DayReport) float64 { return r.Classes[c].P50 })
		add("wait of "+name+", p99", "s", "", func(r *sim.DayReport) float64 { return r.Classes[c].P99 })
	}
	add("wait of gangs, p99", "s", "", func(r *sim.DayReport) float64 { return r.GangWaits.P99 })
	return append(all, figure{Metric: "day: work lost to preemption", Value: us.Lost, Unit: "%", Peer: "no checkpoints", PeerValue: bare.Lost, Target: "1 % at most"})
}
