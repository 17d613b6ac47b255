package main

import (
	"cmp"
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/rxvision/rxvision/sim"
)

type placeFlags struct {
	*benchFlags
	data, nodes, pods, seeds, json string
	policies                       []string
}

func newBenchPlace(b *benchFlags) *cobra.Command {
	p := placeFlags{benchFlags: b}
	cmd := &cobra.Command{
		Use:   "place",
		Short: "GPU allocation that placement reaches on a trace of a real cluster",
		Long: `Places the pods of a trace one by one on its nodes, which begin empty, until they have
asked for 130 % of the GPUs; each is tried once and nothing leaves. Told is how
much of the GPUs was allocated when 100 % and 130 % had been asked for: the
procedure of Weng et al., Beware of Fragmentation (USENIX ATC 2023).

The files have the columns of Alibaba's cluster-trace-gpu-v2023. --data names a
folder with one list of nodes (*node_list*.csv) and lists of pods (*pod_list_NAME.csv);
with published_allocation.csv in it, the published figures stand beside. Ceilings tell what
could be allocated at 100 %: if processors, memory and GPUs lay in one heap, and if the
shares of GPUs that were asked for were all placed, packed anew, the largest first.

With --policy consolidate, Burstable and BE pods may be moved (group meta rx_movable) to make room for one that
finds none: at most four for one, each to where it has room.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runBenchPlace(cmd.Context(), p, cmd.OutOrStdout()) },
	}
	f := cmd.Flags()
	f.StringVar(&p.data, "data", "", "a folder with a list of nodes and lists of pods")
	f.StringVar(&p.nodes, "nodes", "", "the list of nodes")
	f.StringVar(&p.pods, "pods", "", "the list of pods")
	f.StringSliceVar(&p.policies, "policy", slices.DeleteFunc(slices.Clone(sim.Policies), func(p string) bool { return p == "consolidate" }), "how to place: "+strings.Join(sim.Policies, ", "))
	f.StringVar(&p.seeds, "seeds", "42-51", "the seeds that order the pods: numbers and ranges")
	f.StringVar(&p.json, "json", "", "also write each seed's course to this JSON file")
	return cmd
}

// placeCourse is what one policy reached on one trace.
type placeCourse struct {
	Trace  string      `json:"trace"`
	Policy string      `json:"policy"`
	At100  float64     `json:"gpu_allocation_pct_at_100"` // mean of the seeds
	At130  float64     `json:"gpu_allocation_pct_at_130"`
	Spread float64     `json:"gpu_allocation_pct_at_100_stddev"`
	Moves  float64     `json:"moves"` // of pods that had been placed, mean of the seeds
	Micros float64     `json:"us_per_pod"`
	Room   float64     `json:"ceiling_room_pct_at_100"`   // sim.Ceiling, mean of the seeds
	Shares float64     `json:"ceiling_shares_pct_at_100"` // … by the sizes of shares
	Seeds  []placeSeed `json:"seeds"`

	published [2]float64 // at 100 and 130, 0 where not known
}

type placeSeed struct {
	Seed   uint64    `json:"seed"`
	Placed int       `json:"placed"`
	Failed int       `json:"failed"`
	Moves  int       `json:"moves"`                 // of pods that had been placed
	Course []float64 `json:"gpu_allocation_pct_at"` // by percent asked for, from 0
}

func runBenchPlace(ctx context.Context, p placeFlags, out io.Writer) error {
	seeds, err := parseSeeds(p.seeds)
	for _, policy := range p.policies {
		if !slices.Contains(sim.Policies, policy) {
			err = errors.Join(err, fmt.Errorf("--policy %q: use %s", policy, strings.Join(sim.Policies, ", ")))
		}
	}
	lists := map[string]string{}
	published := map[string][2]float64{}
	switch {
	case p.data == "" && (p.nodes == "" || p.pods == ""):
		err = errors.Join(err, errors.New("name a trace: --nodes FILE and --pods FILE, or --data DIR"))
	case p.data != "" && (p.nodes != "" || p.pods != ""):
		err = errors.Join(err, errors.New("--data stands for --nodes and --pods: use either"))
	case p.data == "":
		lists[strings.TrimSuffix(filepath.Base(p.pods), ".csv")] = p.pods
	default:
		var e error
		if p.nodes, lists, published, e = traceFolder(p.data); e != nil {
			err = errors.Join(err, e)
		}
	}
	if err != nil {
		return err
	}
	r := &benchRun{out: out}
	var courses []*placeCourse
	fmt.Fprintf(out, "%-14s %-11s %9s %9s %7s  %9s %9s  %7s %7s %6s %8s\n", "trace", "policy", "at 100 %", "at 130 %", "± (100)", "published", "at 130 %", "ceiling", "shares", "moves", "µs/pod")
	for _, name := range sortedKeys(lists) {
		trace, err := openTrace(p.nodes, lists[name])
		if err != nil {
			return fmt.Errorf("trace %s: %w", name, err)
		}
		for _, policy := range p.policies {
			c := &placeCourse{Trace: name, Policy: policy, published: published[name+"/"+policy]}
			if err := c.run(ctx, trace, seeds, out); err != nil {
				return err
			}
			courses = append(courses, c)
			c.print(out)
			c.figures(r)
		}
	}
	if p.json != "" {
		text, err := json.MarshalIndent(courses, "", " ")
		if err != nil {
			return err
		}
		if err := os.WriteFile(p.json, append(text, '\n'), 0o644); err != nil {
			return err
		}
	}
	return r.write(*p.benchFlags)
}

// run replays the trace once for each seed, on all processors.
func (c *placeCourse) run(ctx context.Context, trace *sim.Trace, seeds []uint64, out io.Writer) error {
	c.Seeds = make([]placeSeed, len(seeds))
	progress := &bar{w: out, what: c.Trace + " " + c.Policy, amount: func(total int64) string { return fmt.Sprintf("of %d seeds", total) }}
	var mu sync.Mutex
	done, pods := int64(0), 0
	var took time.Duration
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for i, seed := range seeds {
		g.Go(func() error {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			start := time.Now()
			r, err := trace.Replay(c.Policy, seed)
			if err != nil {
				return err
			}
			lasted := time.Since(start)
			most := trace.Ceiling(seed, 100)
			mu.Lock()
			defer mu.Unlock()
			c.Room += most.Room / float64(len(seeds))
			c.Shares += most.Shares / float64(len(seeds))
			c.Moves += float64(r.Moves) / float64(len(seeds))
			c.Seeds[i] = placeSeed{seed, r.Placed, r.Failed, r.Moves, r.Allocated}
			c.At100 += r.At(100) / float64(len(seeds))
			c.At130 += r.At(130) / float64(len(seeds))
			took, pods, done = took+lasted, pods+r.Placed+r.Failed, done+1
			progress.set(done, int64(len(seeds)))
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for _, s := range c.Seeds {
		c.Spread += math.Pow((&sim.Replay{Allocated: s.Course}).At(100)-c.At100, 2)
	}
	c.Spread = math.Sqrt(c.Spread / float64(max(len(seeds)-1, 1)))
	c.Micros = float64(took.Microseconds()) / float64(pods)
	return nil
}

func (c *placeCourse) print(out io.Writer) {
	beside := [2]string{"-", "-"}
	for i, v := range c.published {
		if v > 0 {
			beside[i] = strconv.FormatFloat(v, 'f', 2, 64)
		}
	}
	fmt.Fprintf(out, "%-14s %-11s %9.2f %9.2f %7.2f  %9s %9s  %7.2f %7.2f %6.0f %8.0f\n", c.Trace, c.Policy, c.At100, c.At130, c.Spread, beside[0], beside[1], c.Room, c.Shares, c.Moves, c.Micros)
}

func (c *placeCourse) figures(r *benchRun) {
	for i, f := range []figure{
		{Metric: c.Trace + " " + c.Policy + ": GPU allocation at 100 % arrival", Value: c.At100, Unit: "%"},
		{Metric: c.Trace + " " + c.Policy + ": GPU allocation at 130 % arrival", Value: c.At130, Unit: "%"},
		{Metric: c.Trace + " " + c.Policy + ": a placement", Value: c.Micros, Unit: "us"},
	} {
		if i < len(c.published) && c.published[i] > 0 {
			f.Peer, f.PeerValue, f.Target = "published", c.published[i], "published less 0.1"
			if c.Policy != "fgd" {
				f.Target = "published within 0.5"
			}
		}
		r.figures = append(r.figures, f)
	}
	if c.Moves > 0 {
		r.figures = append(r.figures, figure{Metric: c.Trace + " " + c.Policy + ": moves of pods", Value: c.Moves})
	}
}

func openTrace(nodes, pods string) (*sim.Trace, error) {
	n, err := os.Open(nodes)
	if err != nil {
		return nil, err
	}
	defer n.Close()
	p, err := os.Open(pods)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	return sim.ReadTrace(n, p)
}

// traceFolder finds the list of nodes, the lists of pods by name, and what was
// published of them, by trace/policy.
func traceFolder(dir string) (nodes string, pods map[string]string, published map[string][2]float64, err error) {
	found, err := filepath.Glob(filepath.Join(dir, "*node_list*.csv"))
	if err == nil && len(found) != 1 {
		err = fmt.Errorf("%s: %d lists of nodes (*node_list*.csv); there must be one", dir, len(found))
	}
	if err != nil {
		return "", nil, nil, err
	}
	pods = map[string]string{}
	lists, err := filepath.Glob(filepath.Join(dir, "*pod_list_*.csv"))
	if err == nil && len(lists) == 0 {
		err = fmt.Errorf("%s: no list of pods (*pod_list_NAME.csv)", dir)
	}
	for _, l := range lists {
		_, name, _ := strings.Cut(filepath.Base(l), "pod_list_")
		pods[strings.TrimSuffix(name, ".csv")] = l
	}
	if err != nil {
		return "", nil, nil, err
	}
	published, err = readPublished(filepath.Join(dir, "published_allocation.csv"))
	return found[0], pods, published, err
}

// readPublished reads trace,policy,…,gpu_allocation_pct_at_100,gpu_allocation_pct_at_130; a file
// that is not there tells nothing. Policies are numbered there: 06-FGD.
func readPublished(path string) (map[string][2]float64, error) {
	out := map[string][2]float64{}
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return out, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	rows, err := csv.NewReader(f).ReadAll()
	if err != nil || len(rows) == 0 {
		return nil, cmp.Or(err, fmt.Errorf("%s is empty", path))
	}
	column := func(name string) int { return slices.Index(rows[0], name) }
	trace, policy, at100, at130 := column("trace"), column("policy"), column("gpu_allocation_pct_at_100"), column("gpu_allocation_pct_at_130")
	if min(trace, policy, at100, at130) < 0 {
		return nil, fmt.Errorf("%s: want the columns trace, policy, gpu_allocation_pct_at_100 and gpu_allocation_pct_at_130", path)
	}
	for _, row := range rows[1:] {
		name := strings.ToLower(strings.TrimLeft(row[policy], "0123456789-"))
		a, errA := strconv.ParseFloat(row[at100], 64)
		b, errB := strconv.ParseFloat(row[at130], 64)
		if err := errors.Join(errA, errB); err != nil {
			return nil, fmt.Errorf("%s: %s %s: %w", path, row[trace], row[policy], err)
		}
		out[row[trace]+"/"+name] = [2]float64{a, b}
	}
	return out, nil
}

const maxSeeds = 1000

// parseSeeds reads "42-51,60".
func parseSeeds(text string) ([]uint64, error) {
	var out []uint64
	for _, part := range strings.Split(text, ",") {
		low, high, ranged := strings.Cut(part, "-")
		from, err := strconv.ParseUint(low, 10, 63)
		to := from
		if err == nil && ranged {
			to, err = strconv.ParseUint(high, 10, 63)
		}
		if err != nil || to < from || to-from >= maxSeeds || len(out) >= maxSeeds {
			return nil, fmt.Errorf("--seeds %q: want numbers and ranges such as 42-51,60, %d at most", text, maxSeeds)
		}
		for s := from; s <= to; s++ {
			out = append(out, s)
		}
	}
	return out, nil
}
