package main

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"runtime/debug"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/rxvision/rxvision/sim"
)

// simCovers is how many commands a series must have before whatever it never
// went through is an error.
const simCovers = 50_000

func newSim() *cobra.Command {
	var cfg sim.Config
	var duration time.Duration
	cmd := &cobra.Command{
		Use:   "sim",
		Short: "Simulate regions with faults, from a seed, and check that nothing breaks",
		Long: `Runs servers, nodes and users in one goroutine and virtual time, with the real rules,
snapshots and placement, and throws faults at them. Whatever happens is drawn from
the seed: a failing seed fails again in the same step.

Without --seed one is drawn. One seed after the other is run until --duration has
passed; with --seed and without --duration that seed alone.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !cmd.Flags().Changed("seed") {
				cfg.Seed = newSeed()
				if duration == 0 {
					duration = time.Minute
				}
			}
			return runSim(cmd, cfg, duration)
		},
	}
	f := cmd.Flags()
	f.Uint64Var(&cfg.Seed, "seed", 0, "the first seed")
	f.DurationVar(&duration, "duration", 0, "go on with further seeds for so long (1m without --seed)")
	f.IntVar(&cfg.Servers, "servers", 0, "servers, 3 to 5 (drawn from the seed)")
	f.IntVar(&cfg.Nodes, "nodes", 0, "nodes, 1 to 200 (drawn from the seed)")
	f.IntVar(&cfg.Commands, "commands", sim.DefaultCommands, "commands of one seed, before faults and load stop and work must drain")
	f.IntVar(&cfg.Events, "events", sim.DefaultEvents, "events to print when a seed fails")
	return cmd
}

// newSeed draws a seed that is easy to type.
func newSeed() uint64 {
	var b [8]byte
	rand.Read(b[:]) // never fails, by its documentation
	return binary.LittleEndian.Uint64(b[:]) % 1_000_000_000
}

func runSim(cmd *cobra.Command, cfg sim.Config, duration time.Duration) error {
	debug.SetGCPercent(800) // states come and go; there is little to keep
	ctx, out, start := cmd.Context(), cmd.OutOrStdout(), time.Now()
	live := isTerminal(out)
	fmt.Fprintf(out, "first seed %d\n", cfg.Seed)
	totals, err := sim.Series(cfg, func(t sim.Totals) bool {
		took := time.Since(start)
		if live {
			fmt.Fprintf(out, "\r\033[K%s  %d seeds, %d commands (%.0f a minute), %d faults, %s of virtual time",
				took.Round(time.Second), t.Runs, t.Commands, perMinute(t.Commands, took), t.Coverage.Injected(), t.Virtual.Round(time.Second))
		}
		return took < duration && ctx.Err() == nil
	})
	took := time.Since(start)
	if live {
		fmt.Fprint(out, "\r\033[K")
	}
	printSim(out, totals, took)
	var failure *sim.Failure
	if errors.As(err, &failure) {
		fmt.Fprintf(out, "\nThe last %d events:\n%s\n\n", len(failure.Events), strings.Join(failure.Events, "\n"))
		return fmt.Errorf("%w\nreplay: rxvision sim%s", err, replayFlags(cfg, failure.Seed))
	}
	if missing := totals.Coverage.Missing(); err == nil && totals.Commands >= simCovers && len(missing) > 0 {
		return fmt.Errorf("never happened in %d commands: %s", totals.Commands, strings.Join(missing, ", "))
	}
	return err
}

// replayFlags repeats what decides a run, besides what the seed draws.
func replayFlags(cfg sim.Config, seed uint64) string {
	flags := fmt.Sprintf(" -seed %d", seed)
	for _, f := range []struct {
		name         string
		value, unset int
	}{{"servers", cfg.Servers, 0}, {"nodes", cfg.Nodes, 0}, {"commands", cfg.Commands, sim.DefaultCommands}} {
		if f.value != f.unset {
			flags += fmt.Sprintf(" -%s %d", f.name, f.value)
		}
	}
	return flags
}

func perMinute(n int, took time.Duration) float64 { return float64(n) / took.Minutes() }

func printSim(out io.Writer, t sim.Totals, took time.Duration) {
	c := &t.Coverage
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(w, "command\tdone\trefused\t\n")
	for _, k := range slices.Sorted(maps.Keys(c.Kinds)) {
		fmt.Fprintf(w, "%s\t%d\t%d\t\n", k, c.Kinds[k].Done, c.Kinds[k].Refused)
	}
	fmt.Fprint(w, "\t\t\t\nfault\ttimes\t\t\n")
	for _, f := range sim.FaultKinds {
		fmt.Fprintf(w, "%s\t%d\t\t\n", f, c.Faults[f])
	}
	w.Flush()
	m := c.Messages
	fmt.Fprintf(out, `
%d seeds in %s, %s of virtual time, %d events
%d commands applied and checked, %.0f a minute; %d applied by all servers together
%d faults, %.1f for 1,000 commands; besides, of %d messages %d lost and %d doubled, %d streams broken
%d elections, %d snapshots, %d tasks started, %d repeated requests, %d compare-and-sets, %d refused
%d whole states checked, %d hashes compared
`, t.Runs, took.Round(time.Second), t.Virtual.Round(time.Second), t.Steps,
		t.Commands, perMinute(t.Commands, took), t.Applied,
		c.Injected(), 1000*float64(c.Injected())/float64(max(t.Commands, 1)), m.Sent, m.Lost, m.Doubled, m.Streams,
		c.Elections, c.Snapshots, c.Tasks, c.Retries, c.Swaps, c.Conflicts, c.Checks, c.Hashes)
}
