package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"

	"github.com/rxvision/rxvision/api"
	"github.com/rxvision/rxvision/jobspec"
	"github.com/rxvision/rxvision/oip"
	"github.com/rxvision/rxvision/serve/ort"
)

// benchReport is what a benchmark writes: figures, each beside its peer or
// floor measured in the same run.
type benchReport struct {
	Machine string   `json:"machine"`
	Commit  string   `json:"commit"`
	Figures []figure `json:"figures"`
}

// figure is one measured value. Peer names what PeerValue was measured on;
// Target says what is aimed for, "" for nothing in particular.
type figure struct {
	Metric    string  `json:"metric"`
	Value     float64 `json:"value"`
	Unit      string  `json:"unit"`
	Peer      string  `json:"peer,omitempty"`
	PeerValue float64 `json:"peer_value,omitempty"`
	Target    string  `json:"target,omitempty"`
}

type benchFlags struct {
	out, dir, nomad, ort, commit string
	each                         time.Duration
}

func newBench() *cobra.Command {
	var b benchFlags
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure this platform on this machine, beside a floor or a peer in the same run",
		Long: `Starts a platform of its own on a temporary folder and free ports, with the shipped
defaults, measures, prints and ends it. Run it in the project's folder.`,
	}
	cmd.PersistentFlags().StringVar(&b.out, "out", "", "also write the figures to this JSON file")
	cmd.PersistentFlags().StringVar(&b.dir, "dir", ".", "the project's folder")
	cmd.PersistentFlags().StringVar(&b.commit, "commit", "", "commit to note; default: the one this program was built from")
	cmd.PersistentFlags().StringVar(&b.ort, "ort-library", "", "ONNX Runtime library")
	cmd.PersistentFlags().DurationVar(&b.each, "each", 5*time.Second, "time for each figure")
	sub := func(use, short string, run func(context.Context, benchFlags, *benchRun) error) *cobra.Command {
		return &cobra.Command{Use: use, Short: short, Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
			return runBench(cmd.Context(), b, cmd.OutOrStdout(), run)
		}}
	}
	serve := sub("serve", "Requests/s and latency of the sample model through gateway and worker", benchServe)
	cmd.AddCommand(serve, newBenchControl(&b), newBenchSched(&b), newBenchPlace(&b), newBenchDay(&b), newBenchNodes())
	return cmd
}

// benchRun is a platform under measurement.
type benchRun struct {
	cfg     devConfig
	client  *api.Client
	out     io.Writer
	figures []figure
}

func (r *benchRun) add(f figure) {
	r.figures = append(r.figures, f)
	line := fmt.Sprintf("%-52s %12.1f %-10s", f.Metric, f.Value, f.Unit)
	if f.Peer != "" {
		line += fmt.Sprintf(" %s %.1f, ratio %.2f", f.Peer, f.PeerValue, f.Value/f.PeerValue)
	}
	fmt.Fprintln(r.out, strings.TrimRight(line, " "))
}

func runBench(ctx context.Context, b benchFlags, out io.Writer, measure func(context.Context, benchFlags, *benchRun) error) (err error) {
	tmp, err := os.MkdirTemp("", "rxvision-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	r := &benchRun{out: out, cfg: devConfig{dataDir: tmp, ortLibrary: b.ort, logLevel: "info", demoDir: b.dir}}
	for _, addr := range []*string{&r.cfg.http, &r.cfg.rpc, &r.cfg.raft, &r.cfg.agentHTTP, &r.cfg.gatewayAddr} {
		if *addr, err = freeLoopback(); err != nil {
			return err
		}
	}
	if r.client, err = api.NewClient("http://"+r.cfg.http, "", nil); err != nil {
		return err
	}
	dev, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- runDev(dev, r.cfg, io.Discard) }()
	err = (&supervisor{cfg: r.cfg}).awaitReady(ctx)
	if err == nil {
		err = measure(ctx, b, r)
	}
	stop()
	if err = errors.Join(err, <-ended); err != nil {
		return err
	}
	return r.write(b)
}

func (r *benchRun) write(b benchFlags) error {
	if b.out == "" {
		return nil
	}
	report := benchReport{Machine: machineText(), Commit: cmp.Or(b.commit, thisBuild().Commit), Figures: r.figures}
	text, err := json.MarshalIndent(report, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(b.out), 0o755); err != nil {
		return err
	}
	fmt.Fprintln(r.out, "figures:", b.out)
	return os.WriteFile(b.out, append(text, '\n'), 0o644)
}

// machineText names the processor and how many of it.
func machineText() string {
	name := runtime.GOARCH
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
				name = strings.TrimSpace(v)
				break
			}
		}
	}
	return fmt.Sprintf("%s, %d processors, %s", name, runtime.NumCPU(), runtime.GOOS)
}

// freeLoopback gives an address on which nothing listens. Its port lies below those
// that systems give to outgoing connections, of which a benchmark has thousands: so it
// is still free when its server begins, and begins again.
func freeLoopback() (string, error) {
	const lowest, ports, tries = 20_000, 12_000, 100
	var err error
	for range tries {
		var l net.Listener
		if l, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", lowest+rand.N(ports))); err == nil {
			return l.Addr().String(), l.Close()
		}
	}
	return "", err
}

// sample is what a closed loop of clients measured.
type sample struct {
	perSecond float64
	p50, p99  time.Duration
}

// closedLoop lets n clients call f without pause for a while, after a warm-up.
// A failed call ends it.
func closedLoop(ctx context.Context, n int, each time.Duration, f func(context.Context, int) error) (sample, error) {
	var (
		wg      sync.WaitGroup
		warm    atomic.Bool
		mu      sync.Mutex
		all     []time.Duration
		failure error
	)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := make(chan struct{})
	for i := range n {
		wg.Go(func() {
			var own []time.Duration
			defer func() { mu.Lock(); all = append(all, own...); mu.Unlock() }()
			for {
				select {
				case <-stop:
					return
				default:
				}
				measured, began := warm.Load(), time.Now()
				if err := f(ctx, i); err != nil {
					mu.Lock()
					failure = cmp.Or(failure, err)
					mu.Unlock()
					cancel()
					return
				}
				if measured {
					own = append(own, time.Since(began))
				}
			}
		})
	}
	wait := func(d time.Duration) {
		select {
		case <-time.After(d):
		case <-ctx.Done():
		}
	}
	wait(each / 5)
	warm.Store(true)
	began := time.Now()
	wait(each)
	close(stop)
	wg.Wait()
	took := time.Since(began)
	if failure != nil {
		return sample{}, failure
	}
	if len(all) == 0 {
		return sample{}, cmp.Or(ctx.Err(), errors.New("nothing was measured"))
	}
	slices.Sort(all)
	return sample{float64(len(all)) / took.Seconds(), all[len(all)/2], all[len(all)*99/100]}, nil
}

// benchServe measures the sample model through gateway and worker at several
// concurrencies, JSON and binary. The floor is the model called in a loop in one
// process, a goroutine for each processor.
func benchServe(ctx context.Context, b benchFlags, r *benchRun) error {
	model := filepath.Join(b.dir, demoModel)
	pixels := make([]float32, 28*28)
	for i := range pixels {
		pixels[i] = float32(i%255) / 255
	}
	input := oip.FromFloat32("images", []int64{1, 1, 28, 28}, pixels)

	if err := ort.Load(ortLibrary(b.ort), slog.New(slog.DiscardHandler)); err != nil {
		return err
	}
	session, err := ort.Open(model, ort.Options{Threads: 1})
	if err != nil {
		return err
	}
	defer session.Close()
	floor, err := closedLoop(ctx, runtime.GOMAXPROCS(0), b.each, func(ctx context.Context, _ int) error {
		_, err := session.Run(ctx, []oip.Tensor{input}, []string{"logits"})
		return err
	})
	if err != nil {
		return err
	}
	const floorName = "ONNX Runtime in one process"
	r.add(figure{Metric: "floor requests/s", Value: floor.perSecond, Unit: "1/s"})

	f, err := os.Open(model)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if _, err := r.client.Push(ctx, "fashion", api.About{}, f, info.Size(), nil); err != nil {
		return err
	}
	reg, err := submit(ctx, r.client, filepath.Join(b.dir, demoJob), jobspec.ParseOptions{})
	if err != nil {
		return err
	}
	if err := watchJob(ctx, r.client, reg.EvalID, io.Discard); err != nil {
		return err
	}
	request := oip.Request{Inputs: []oip.Tensor{input}}
	asJSON, _, err := request.Encode(nil, false)
	if err != nil {
		return err
	}
	request.BinaryOutput = true
	head, tail, err := request.Encode(nil, true)
	if err != nil {
		return err
	}
	forms := []struct {
		name   string
		body   []byte
		header http.Header
	}{
		{"JSON", asJSON, http.Header{"Content-Type": {"application/json"}}},
		{"binary", append(slices.Clone(head), bytes.Join(tail, nil)...), http.Header{"Content-Type": {"application/octet-stream"}, oip.HeaderLength: {strconv.Itoa(len(head))}}},
	}
	target := "http://" + r.cfg.gatewayAddr + "/v2/models/fashion/infer"
	for _, form := range forms {
		for _, n := range []int{1, 8, 32} {
			client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: n, DisableCompression: true}}
			s, err := closedLoop(ctx, n, b.each, func(ctx context.Context, _ int) error {
				return requestOnce(ctx, client, http.MethodPost, target, form.header, form.body)
			})
			client.CloseIdleConnections()
			if err != nil {
				return err
			}
			name := fmt.Sprintf("gateway+worker %s, concurrency %d: ", form.name, n)
			r.add(figure{Metric: name + "requests/s", Value: s.perSecond, Unit: "1/s", Peer: floorName, PeerValue: floor.perSecond})
			r.add(figure{Metric: name + "p50", Value: float64(s.p50.Microseconds()) / 1000, Unit: "ms"})
			r.add(figure{Metric: name + "p99", Value: float64(s.p99.Microseconds()) / 1000, Unit: "ms"})
		}
	}
	return nil
}

// requestOnce makes a request and reads the answer, which must be 200.
func requestOnce(ctx context.Context, client *http.Client, method, target string, header http.Header, body []byte) error {
	req, err := http.NewRequestWithContext(ctx, method, target, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header = header
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", resp.Status, answer)
	}
	return err
}
