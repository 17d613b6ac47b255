package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"
	_ "time/tzdata" // periodic jobs name zones, whatever the host has of them

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/rxvision/rxvision/api"
	"github.com/rxvision/rxvision/blob"
	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet"
	"github.com/rxvision/rxvision/fleet/pb"
	"github.com/rxvision/rxvision/pki"
	"github.com/rxvision/rxvision/raftstore"
	"github.com/rxvision/rxvision/registry"
	"github.com/rxvision/rxvision/scheduler"
)

type serverConfig struct {
	dataDir, name, region, datacenter          string
	http, rpc, raft                            string
	httpAdvertise, rpcAdvertise, raftAdvertise string
	expect                                     int
	join                                       []string
	dev                                        bool
	ca, cert, key, nodeCert, nodeKey           string
	acl                                        bool
	leaveOnInterrupt, leaveOnTerminate         bool
	blobs                                      string
	logStore                                   string
	maxModel                                   int64
	logLevel                                   string
	retention                                  scheduler.Retention
}

func newServer() *cobra.Command {
	var c serverConfig
	cmd := &cobra.Command{
		Use:   "server",
		Short: "Run a server: state, scheduler, HTTP API, registry",
		Long: `Runs one of the servers of a region: 1, 3 or 5 of them agree on the state. Each is
told how many begin the region (--bootstrap-expect) and where some of the others
are (--retry-join); those that come later join what is there.

Servers speak TLS: see ` + "`rxvision tls ca create`" + `. SIGHUP reloads certificates and
the settings marked so. SIGTERM ends a server, which keeps its place in the region; to
take it out for good: rxvision server leave, or --leave-on-terminate.`,
		Args: cobra.NoArgs,
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		log, level, err := newLeveledLogger(cmd.ErrOrStderr(), c.logLevel)
		if err != nil {
			return err
		}
		r := &reload{cmd: cmd, fresh: newServer, log: log, apply: func(_, value string) error { return setLevel(level, value) }}
		return runServer(cmd.Context(), c.complete(), log, r)
	}
	host, err := os.Hostname()
	if err != nil {
		host = "server"
	}
	f := cmd.Flags()
	f.StringVar(&c.dataDir, "data-dir", filepath.Join(defaultDataDir, "server"), "folder of the log, snapshots and models")
	f.StringVar(&c.name, "name", host, "this server's name")
	f.StringVar(&c.region, "region", "global", "the region")
	f.StringVar(&c.datacenter, "datacenter", "dc1", "the datacenter")
	f.StringVar(&c.http, "http-addr", defaultHTTPAddr, "address of the HTTP API")
	f.StringVar(&c.rpc, "rpc-addr", defaultRPCAddr, "address that agents and gateways dial")
	f.StringVar(&c.raft, "raft-addr", defaultRaftAddr, "address that the other servers dial")
	f.StringVar(&c.httpAdvertise, "http-advertise", "", "host:port at which others reach --http-addr; default: that")
	f.StringVar(&c.rpcAdvertise, "rpc-advertise", "", "host:port at which others reach --rpc-addr; default: that")
	f.StringVar(&c.raftAdvertise, "raft-advertise", "", "host:port at which others reach --raft-addr; default: that")
	f.IntVar(&c.expect, "bootstrap-expect", 1, "servers that begin a new region together: 1, 3 or 5; 0: only join one that is there")
	f.StringSliceVar(&c.join, "retry-join", nil, "Raft address of another server, tried until it answers; may be given several times")
	f.BoolVar(&c.dev, "dev", false, "plain text and no access control, on loopback addresses only")
	f.StringVar(&c.ca, "tls-ca", "", "PEM file of the region's CA")
	f.StringVar(&c.cert, "tls-cert", "", "PEM file of this server's certificate")
	f.StringVar(&c.key, "tls-key", "", "PEM file of its private key")
	f.StringVar(&c.nodeCert, "node-ca-cert", "", "PEM file of the CA that signs certificates of nodes, gateways and workers")
	f.StringVar(&c.nodeKey, "node-ca-key", "", "PEM file of its private key")
	f.BoolVar(&c.acl, "acl", true, "ask for tokens (nomad acl bootstrap); off with --dev")
	f.BoolVar(&c.leaveOnInterrupt, "leave-on-interrupt", false, "SIGINT takes the server out of the region before it ends")
	f.BoolVar(&c.leaveOnTerminate, "leave-on-terminate", false, "SIGTERM takes the server out of the region before it ends")
	f.StringVar(&c.blobs, "blobs", "", "store of model artifacts, as file:///folder?shared=true where all servers see the same one; default: a folder in --data-dir for a single server, none for several")
	f.StringVar(&c.logStore, "log-store", "", "store of the log in a new data folder: wal or bbolt")
	f.Int64Var(&c.maxModel, "max-model-bytes", registry.DefaultMaxModel, "largest model artifact")
	r := &c.retention
	f.DurationVar(&r.JobGCInterval, "job-gc-interval", 5*time.Minute, "how often the leader looks for what has ended")
	f.DurationVar(&r.JobGCThreshold, "job-gc-threshold", 4*time.Hour, "how long a job that has ended is kept")
	f.DurationVar(&r.EvalGCThreshold, "eval-gc-threshold", time.Hour, "how long evaluations and allocations that have ended are kept")
	f.DurationVar(&r.BatchEvalGCThreshold, "batch-eval-gc-threshold", 24*time.Hour, "the same of batch jobs")
	f.DurationVar(&r.DeploymentGCThreshold, "deployment-gc-threshold", time.Hour, "how long a deployment that has ended is kept")
	f.DurationVar(&r.NodeGCThreshold, "node-gc-threshold", 24*time.Hour, "how long a node that is down is kept")
	f.StringVar(&c.logLevel, "log-level", "info", "debug, info, warn or error")
	addConfig(cmd, func() error { return c.check() }, "log-level")
	cmd.AddCommand(newServerRebuild(), newServerLeave())
	return cmd
}

// check reports everything that is wrong with the settings at once.
func (c serverConfig) check() error {
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	if c.name == "" {
		fault("--name is needed: it tells operators which server it is")
	}
	if c.dataDir == "" {
		fault("--data-dir is needed")
	}
	if !slices.Contains([]int{0, 1, 3, 5}, c.expect) {
		fault("--bootstrap-expect %d: a region has 1, 3 or 5 servers; 0 joins one that is there", c.expect)
	}
	if c.expect != 1 && len(c.join) == 0 {
		fault("--retry-join is needed with --bootstrap-expect %d: name the Raft address of at least one other server", c.expect)
	}
	if err := pki.CheckRegion(c.region); err != nil {
		fault("--region: %w", err)
	}
	for i, a := range c.join {
		if _, port, err := net.SplitHostPort(a); err != nil || !isPort(port) {
			fault("--retry-join %q (the %d.): want HOST:PORT of a server's Raft address", a, i+1)
		}
	}
	r := c.retention
	for _, d := range []struct {
		flag  string
		value time.Duration
	}{
		{"job-gc-interval", r.JobGCInterval},
		{"job-gc-threshold", r.JobGCThreshold},
		{"eval-gc-threshold", r.EvalGCThreshold},
		{"batch-eval-gc-threshold", r.BatchEvalGCThreshold},
		{"deployment-gc-threshold", r.DeploymentGCThreshold},
		{"node-gc-threshold", r.NodeGCThreshold},
	} {
		if d.value <= 0 {
			fault("--%s %s: want a duration above zero", d.flag, d.value)
		}
	}
	if err := setLevel(new(slog.LevelVar), c.logLevel); err != nil {
		fault("--log-level %w", err)
	}
	addrs := map[string]string{"http-addr": c.http, "rpc-addr": c.rpc, "raft-addr": c.raft}
	if c.dev {
		faults = append(faults, loopbackOnly(addrs))
	} else {
		named := true
		for _, f := range []struct{ flag, file string }{
			{"tls-ca", c.ca}, {"tls-cert", c.cert}, {"tls-key", c.key}, {"node-ca-cert", c.nodeCert}, {"node-ca-key", c.nodeKey},
		} {
			if f.file == "" {
				named = false
				fault("--%s is needed: servers speak TLS (rxvision tls ca create, rxvision tls cert create --server); --dev runs one without, on loopback", f.flag)
			}
		}
		if named { // read here to tell what is wrong with them beside all else
			_, err := loadServerKeys(c, slog.New(slog.DiscardHandler), nil)
			faults = append(faults, err)
		}
	}
	whole := c.complete()
	for _, a := range []struct{ name, bind, given, advertise string }{
		{"http", c.http, c.httpAdvertise, whole.httpAdvertise}, {"rpc", c.rpc, c.rpcAdvertise, whole.rpcAdvertise}, {"raft", c.raft, c.raftAdvertise, whole.raftAdvertise},
	} {
		flag := a.name + "-advertise"
		if a.given == "" {
			flag = a.name + "-addr"
		}
		host, port, err := net.SplitHostPort(a.advertise)
		switch {
		case err != nil:
			fault("--%s %q: want HOST:PORT", flag, a.advertise)
		case !isPort(port):
			fault("--%s %q: %q is no port", flag, a.advertise, port)
		case host == "" || net.ParseIP(host).IsUnspecified():
			fault("--%s-advertise is needed: nobody can reach %q", a.name, a.advertise)
		case port == "0" && a.advertise != a.bind:
			fault("--%s-advertise %q: want a port", a.name, a.advertise)
		}
	}
	return errors.Join(faults...)
}

// complete is the configuration with what follows from its settings. The settings themselves stay as they were given: a
// reload compares them.
func (c serverConfig) complete() serverConfig {
	c.httpAdvertise = cmp.Or(c.httpAdvertise, c.http)
	c.rpcAdvertise = cmp.Or(c.rpcAdvertise, c.rpc)
	c.raftAdvertise = cmp.Or(c.raftAdvertise, c.raft)
	c.acl = c.acl && !c.dev
	return c
}

func isPort(s string) bool {
	_, err := strconv.ParseUint(s, 10, 16)
	return err == nil
}

// serverKeys are a server's certificates; nil with --dev.
type serverKeys struct {
	material *pki.Material
	issuer   *pki.Issuer
}

func loadServerKeys(c serverConfig, log *slog.Logger, reg prometheus.Registerer) (*serverKeys, error) {
	if c.dev {
		return nil, nil
	}
	m, err := pki.Load(pki.Config{
		CA: c.ca, Cert: c.cert, Key: c.key, Region: c.region, Role: pki.RoleServer, Use: "wire",
		Logger: log.With("part", "pki"), Registerer: reg,
	})
	if err != nil {
		return nil, err
	}
	issuer, err := pki.NewIssuer(pki.IssuerConfig{Cert: c.nodeCert, Key: c.nodeKey, Material: m, Logger: log.With("part", "pki")})
	if err != nil {
		return nil, err
	}
	return &serverKeys{m, issuer}, nil
}

// raft is how servers speak with each other.
func (k *serverKeys) raft() *raftstore.PeerTLS {
	if k == nil {
		return nil
	}
	servers := pki.Only(pki.RoleServer)
	return &raftstore.PeerTLS{
		Server: func() *tls.Config { return k.material.Server(servers) },
		Client: func() *tls.Config { return k.material.Client(servers) },
	}
}

// rpc are the credentials of the port for agents and gateways. Who shows no
// certificate may enrol and nothing else; one that has ended may be renewed.
func (k *serverKeys) rpc() []grpc.ServerOption {
	if k == nil {
		return nil
	}
	return []grpc.ServerOption{grpc.Creds(credentials.NewTLS(k.material.Server(fleet.PeersOf())))}
}

// https wraps the listener of the HTTP API.
func (k *serverKeys) https(l net.Listener) net.Listener {
	if k == nil {
		return l
	}
	conf := k.material.HTTPS(pki.Peers{})
	conf.NextProtos = []string{"http/1.1"} // as Nomad's clients and servers speak
	return tls.NewListener(l, conf)
}

func (k *serverKeys) run(ctx context.Context, g *errgroup.Group) {
	if k != nil {
		g.Go(func() error { return k.material.Run(ctx) })
		g.Go(func() error { return k.issuer.Run(ctx) })
	}
}

func (k *serverKeys) reload() error {
	if k == nil {
		return nil
	}
	return errors.Join(k.material.Reload(), k.issuer.Reload())
}

// runServer opens the store and serves it. A store whose disk failed before is
// served for stale reads only, until the disk can be written again.
func runServer(ctx context.Context, c serverConfig, log *slog.Logger, reload *reload) error {
	if os.Getenv("GOGC") == "" { // else it is the operator's choice
		var wg sync.WaitGroup
		defer wg.Wait()
		until, stop := context.WithCancel(ctx)
		defer stop()
		wg.Go(func() { collect(until) })
	}
	for {
		reg := newMetrics()
		keys, err := loadServerKeys(c, log, reg)
		if err != nil {
			return err
		}
		reload.more = []func() error{keys.reload}
		conf := raftstore.Config{
			Dir: filepath.Join(c.dataDir, raftFolder), Bind: c.raft, Advertise: c.raftAdvertise, Name: c.name, Version: version,
			Region: c.region, Datacenter: c.datacenter, HTTPAddr: c.httpAdvertise, RPCAddr: c.rpcAdvertise,
			BootstrapExpect: c.expect, RetryJoin: c.join, TLS: keys.raft(), LogStore: c.logStore,
			Logger: log.With("part", "raftstore"), Registerer: reg,
		}
		store, err := raftstore.Open(conf)
		var broken *raftstore.Unwritable
		switch {
		case errors.As(err, &broken):
			log.Error("the data folder cannot be written; stale reads only until it can", "error", err)
			err = serveReadOnly(ctx, c, log, reg, keys, conf, broken, reload)
			if err != nil || ctx.Err() != nil {
				return err
			}
			log.Info("the data folder can be written again")
		case err != nil:
			return err
		default:
			return whileSound(ctx, store, fatalLimit, func(ctx context.Context) error {
				return serveStore(ctx, c, log, reg, keys, store, reload)
			})
		}
	}
}

// fatalLimit bounds how long a server whose store has failed takes to end: its disk may
// answer nothing any more.
const fatalLimit = 10 * time.Second

// whileSound serves until the store fails; then it ends serve and gives the reason,
// after limit whether serve has ended or not.
func whileSound(ctx context.Context, store interface{ Fatal() <-chan error }, limit time.Duration, serve func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- serve(ctx) }()
	var reason error
	select {
	case err := <-done:
		return err
	case reason = <-store.Fatal():
	}
	cancel()
	select {
	case err := <-done:
		if err != nil {
			reason = err // the store's own is in it: Close gives it, too
		}
	case <-time.After(limit):
		reason = fmt.Errorf("%w; not everything ended within %v", reason, limit)
	}
	return fmt.Errorf("the store can go on no longer: %w", reason)
}

// serveReadOnly answers stale reads until the disk has recovered or ctx ends.
func serveReadOnly(ctx context.Context, c serverConfig, log *slog.Logger, reg *prometheus.Registry, keys *serverKeys, conf raftstore.Config, broken *raftstore.Unwritable, reload *reload) (err error) {
	store, err := raftstore.OpenReadOnly(conf, broken)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	l, err := net.Listen("tcp", c.http)
	if err != nil {
		return fmt.Errorf("listen for the HTTP API: %w", err)
	}
	handler := c.handler(api.Config{
		Store: store, Servers: frozen{store, c}, ACL: api.ACL{Enabled: c.acl}, ID: store.ID(),
		Logger: log.With("part", "api"), Registry: reg,
	})
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	keys.run(ctx, g)
	g.Go(func() error { return reload.run(ctx) })
	g.Go(func() error { return api.Serve(ctx, keys.https(l), handler) })
	g.Go(func() error {
		defer cancel()
		select {
		case <-store.Recovered():
		case <-ctx.Done():
		}
		return nil
	})
	return g.Wait()
}

// handler is the HTTP API with what does not depend on the store.
func (c serverConfig) handler(conf api.Config) http.Handler {
	conf.Name, conf.Region, conf.Datacenter, conf.Version = c.name, c.region, c.datacenter, version
	conf.Drivers = []string{"onnx", "raw_exec", "exec"}
	if !c.dev { // a web page cannot reach what asks for a certificate that it trusts, and has no token
		return api.New(conf)
	}
	return guard(api.New(conf), c.http, func(w http.ResponseWriter, why string) { http.Error(w, why, http.StatusForbidden) })
}

// openBlobs opens the store of artifacts. Several servers need one that all of
// them see; without it they take no models.
func (c serverConfig) openBlobs(ctx context.Context) (*blob.Store, error) {
	at := c.blobs
	if at == "" {
		if c.expect != 1 {
			return nil, nil
		}
		dir, err := filepath.Abs(filepath.Join(c.dataDir, "blobs"))
		if err != nil {
			return nil, err
		}
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
		at = "file://" + dir
	}
	blobs, err := blob.OpenStore(ctx, at)
	if err != nil {
		return nil, fmt.Errorf("--blobs: open the model store: %w", err)
	}
	if c.expect != 1 && !blobs.Shared() {
		return nil, errors.Join(fmt.Errorf("--blobs %s: the servers of a region need one store that all of them see; if this folder is such a one, say so with ?shared=true", at), blobs.Close())
	}
	return blobs, nil
}

// noBlobs stands where a server has no store of artifacts.
type noBlobs struct{}

func (noBlobs) Open(_ context.Context, digest string, _ int64) (io.ReadCloser, int64, error) {
	return nil, 0, cluster.Errorf(cluster.CodeNotFound, "artifact %s: this server has no store of artifacts (--blobs)", digest)
}

// serveStore is the story of a server: what reads and writes the store, then the
// listeners, so that nothing is asked of a half-made server. It ends in
// the opposite order.
func serveStore(ctx context.Context, c serverConfig, log *slog.Logger, reg *prometheus.Registry, keys *serverKeys, store *raftstore.Store, reload *reload) (err error) {
	defer func() { err = errors.Join(err, store.Close()) }()
	told := ctx
	ctx, end := context.WithCancel(ctx)
	defer end()
	blobs, err := c.openBlobs(ctx)
	if err != nil {
		return err
	}
	if blobs != nil {
		defer func() { err = errors.Join(err, blobs.Close()) }()
	}

	// The fleet serves the registry's artifacts and checks the registry's models:
	// each sees the other through an interface.
	artifacts := &lateBlobs{noBlobs{}}
	fleetConf := fleet.Config{
		Name: c.name, Store: store, Peers: peerNet{store}, ReadIndex: store.ReadIndex, Blobs: artifacts,
		RequireIdentity: keys != nil, Logger: log.With("part", "fleet"), Registerer: reg,
	}
	if keys != nil {
		fleetConf.Issuer = keys.issuer
	}
	nodes := fleet.NewServer(fleetConf)
	sched, err := scheduler.New(scheduler.Config{Store: store, Retention: c.retention, Metrics: nodes, Logger: log.With("part", "scheduler"), Registerer: reg})
	if err != nil {
		return err
	}
	store.Answer(answers(sched))
	plans := planner{new(scheduler.DryRuns), store}
	apiConf := api.Config{
		Store: store, Nodes: callNodes{nodes}, Planner: plans, Autoscaler: plans, Archives: archives{store}, Servers: servers{store, end}, Collector: sched,
		ACL: api.ACL{Enabled: c.acl, BootstrapReset: bootstrapReset(filepath.Join(c.dataDir, bootstrapResetFile), log)}, ID: store.ID(), Logger: log.With("part", "api"), Registry: reg,
	}
	var models *registry.Registry
	if blobs != nil {
		models = registry.New(registry.Config{Store: store, Blobs: blobs, Checker: nodes, MaxModel: c.maxModel, Logger: log.With("part", "registry")})
		artifacts.Blobs, apiConf.Models = models, models
	}
	handler := c.handler(apiConf)

	rpc := grpc.NewServer(append([]grpc.ServerOption{
		grpc.MaxRecvMsgSize(fleet.MaxMessage), grpc.MaxSendMsgSize(fleet.MaxRoutes),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}),
	}, keys.rpc()...)...)
	pb.RegisterFleetServer(rpc, nodes)
	rpcListener, err := net.Listen("tcp", c.rpc)
	if err != nil {
		return fmt.Errorf("listen for agents and gateways: %w", err)
	}
	httpListener, err := net.Listen("tcp", c.http)
	if err != nil {
		rpcListener.Close()
		return fmt.Errorf("listen for the HTTP API: %w", err)
	}
	g, ctx := errgroup.WithContext(ctx)
	keys.run(ctx, g)
	g.Go(func() error { return reload.run(ctx) })
	g.Go(func() error { return nodes.Run(ctx) })
	g.Go(func() error { return sched.Run(ctx) })
	if models != nil {
		g.Go(func() error { return sweep(ctx, store, models, log) })
	}
	g.Go(func() error { return rpc.Serve(rpcListener) })
	g.Go(func() error { return api.Serve(ctx, keys.https(httpListener), handler) })
	g.Go(func() error {
		<-ctx.Done()
		rpc.Stop() // agents and gateways go on by themselves and come back
		return nil
	})
	log.Info("server is up", "name", c.name, "http", c.http, "rpc", c.rpc, "raft", c.raft, "version", version)
	if err := g.Wait(); err != nil {
		return err
	}
	if c.leaves(told) {
		leave, cancel := context.WithTimeout(context.Background(), leaveLimit)
		defer cancel()
		if err := store.Leave(leave); err != nil {
			return fmt.Errorf("leave the region: %w; this server keeps its place: take it out with nomad server force-leave %s, or start it again", err, c.name)
		}
		log.Info("this server has left the region")
	}
	return nil
}

// sweep deletes the bytes of forgotten models whenever this server begins to lead:
// only a leader is known to have applied all that names a model.
func sweep(ctx context.Context, store *raftstore.Store, models *registry.Registry, log *slog.Logger) error {
	for leads := range store.LeaderCh(ctx) {
		if !leads {
			continue
		}
		if err := models.Sweep(ctx); err != nil && ctx.Err() == nil {
			log.Warn("forgotten models could not be deleted", "error", err)
		}
	}
	return nil
}

// lateBlobs is the fleet's view of the registry, which is made after the fleet.
type lateBlobs struct{ fleet.Blobs }

// newMetrics is a registry with the process's and Go's own figures.
func newMetrics() *prometheus.Registry {
	reg := prometheus.NewRegistry()
	reg.MustRegister(
		collectors.NewGoCollector(collectors.WithGoCollectorRuntimeMetrics(collectors.MetricsGC)),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	return reg
}
