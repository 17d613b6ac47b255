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
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/rxvision/rxvision/api"
	"github.com/rxvision/rxvision/jobspec"
	"github.com/rxvision/rxvision/oip"
	"github.com/rxvision/rxvision/proc"
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
	control := sub("control", "Registered jobs/s of a single server", benchControl)
	control.Flags().StringVar(&b.nomad, "nomad", "", "the real nomad to measure beside it; default: none")
	cmd.AddCommand(serve, control)
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

func freeLoopback() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
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
	if _, err := r.client.Push(ctx, "fashion", "", f, info.Size(), nil); err != nil {
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
				return inferOnce(ctx, client, target, form.header, form.body)
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

func inferOnce(ctx context.Context, client *http.Client, target string, header http.Header, body []byte) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, target, bytes.NewReader(body))
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

// benchControl measures accepted registrations of distinct jobs of one
// allocation, which no node takes, so that the server alone is measured.
func benchControl(ctx context.Context, b benchFlags, r *benchRun) error {
	ours, err := registrations(ctx, b, "http://"+r.cfg.http)
	if err != nil {
		return err
	}
	peer := map[int]sample{}
	if b.nomad != "" {
		if peer, err = nomadRegistrations(ctx, b, r.cfg.dataDir); err != nil {
			return err
		}
	}
	for _, n := range controlClients {
		f := figure{Metric: fmt.Sprintf("registered jobs/s, %d clients", n), Value: ours[n].perSecond, Unit: "1/s"}
		if p, ok := peer[n]; ok {
			f.Peer, f.PeerValue = "nomad 1.11.1, one server", p.perSecond
		}
		r.add(f)
		r.add(figure{Metric: fmt.Sprintf("registration p99, %d clients", n), Value: float64(ours[n].p99.Microseconds()) / 1000, Unit: "ms"})
	}
	return nil
}

var controlClients = []int{1, 8, 32}

func registrations(ctx context.Context, b benchFlags, base string) (map[int]sample, error) {
	var serial atomic.Int64
	out := map[int]sample{}
	for _, n := range controlClients {
		client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: n}}
		s, err := closedLoop(ctx, n, b.each, func(ctx context.Context, _ int) error {
			body := fmt.Sprintf(`{"Job":{"ID":"bench-%d","Name":"bench","Type":"service","Datacenters":["nowhere"],"TaskGroups":[{"Name":"g","Count":1,"Tasks":[{"Name":"t","Driver":"raw_exec","Config":{"command":"/bin/true"},"Resources":{"CPU":10,"MemoryMB":10}}]}]}}`, serial.Add(1))
			req, err := http.NewRequestWithContext(ctx, http.MethodPut, base+"/v1/jobs", strings.NewReader(body))
			if err != nil {
				return err
			}
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
		})
		client.CloseIdleConnections()
		if err != nil {
			return nil, err
		}
		out[n] = s
	}
	return out, nil
}

// nomadRegistrations measures the same on a real nomad server with a real data
// folder and its defaults.
func nomadRegistrations(ctx context.Context, b benchFlags, dir string) (_ map[int]sample, err error) {
	nomad, err := filepath.Abs(b.nomad)
	if err != nil {
		return nil, err
	}
	var ports [3]string
	for i := range ports {
		addr, err := freeLoopback()
		if err != nil {
			return nil, err
		}
		_, ports[i], _ = strings.Cut(addr, ":")
	}
	config := filepath.Join(dir, "nomad.hcl")
	text := fmt.Sprintf("data_dir = %q\nbind_addr = \"127.0.0.1\"\nadvertise {\n  http = \"127.0.0.1\"\n  rpc = \"127.0.0.1\"\n  serf = \"127.0.0.1\"\n}\nports {\n  http = %s\n  rpc = %s\n  serf = %s\n}\nserver {\n  enabled = true\n  bootstrap_expect = 1\n}\n",
		filepath.Join(dir, "nomad"), ports[0], ports[1], ports[2])
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	p, err := proc.Start(proc.Spec{
		Path: nomad, Stdout: proc.LogFiles{Dir: dir, Name: "nomad"}, Stderr: proc.LogFiles{Dir: dir, Name: "nomad"}, Args: []string{"agent", "-config", config}, Env: os.Environ(), Dir: dir,
		StatusFile: filepath.Join(dir, "nomad.status"), DieWithParent: true,
	})
	if err != nil {
		return nil, err
	}
	defer func() {
		_, stopErr := p.Stop(ctx, syscall.SIGINT, 10*time.Second)
		p.Detach()
		err = errors.Join(err, stopErr)
	}()
	base := "http://127.0.0.1:" + ports[0]
	for {
		if leader, err := httpGet(ctx, base+"/v1/status/leader"); err == nil && strings.Contains(string(leader), ":") {
			break
		}
		select {
		case <-p.Done():
			return nil, fmt.Errorf("nomad ended at once: %s", lastLine(filepath.Join(dir, "nomad.0")))
		default:
		}
		if err := pause(ctx); err != nil {
			return nil, err
		}
	}
	return registrations(ctx, b, base)
}
