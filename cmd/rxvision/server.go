package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	"github.com/rxvision/rxvision/api"
	"github.com/rxvision/rxvision/blob"
	"github.com/rxvision/rxvision/fleet"
	"github.com/rxvision/rxvision/fleet/pb"
	"github.com/rxvision/rxvision/raftstore"
	"github.com/rxvision/rxvision/registry"
	"github.com/rxvision/rxvision/scheduler"
)

type serverConfig struct {
	dataDir, name, region, datacenter string
	http, rpc, raft                   string
	maxModel                          int64
	logLevel                          string
}

func newServer() *cobra.Command {
	var c serverConfig
	cmd := &cobra.Command{
		Use:   "server",
		Short: "Run a server: state, scheduler, HTTP API, registry",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := newLogger(cmd.ErrOrStderr(), c.logLevel)
			if err != nil {
				return err
			}
			return runServer(cmd.Context(), c, log)
		},
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
	f.StringVar(&c.raft, "raft-addr", defaultRaftAddr, "address of the replicated log")
	f.Int64Var(&c.maxModel, "max-model-bytes", registry.DefaultMaxModel, "largest model artifact")
	f.StringVar(&c.logLevel, "log-level", "info", "debug, info, warn or error")
	return cmd
}

// runServer is the story of a server: the store first, since all rests on it;
// then what reads and writes it; the listeners last, so that nothing is
// asked of a half-made server. It ends in the opposite order.
func runServer(ctx context.Context, c serverConfig, log *slog.Logger) (err error) {
	if err := loopbackOnly(map[string]string{"http-addr": c.http, "rpc-addr": c.rpc, "raft-addr": c.raft}); err != nil {
		return err
	}
	reg := newMetrics()
	store, err := raftstore.Open(raftstore.Config{
		Dir: filepath.Join(c.dataDir, "raft"), Bind: c.raft, Name: c.name, Version: version,
		Bootstrap: true, Logger: log.With("part", "raftstore"), Registerer: reg,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()

	blobDir, err := filepath.Abs(filepath.Join(c.dataDir, "blobs"))
	if err != nil {
		return err
	}
	if err := os.MkdirAll(blobDir, 0o700); err != nil {
		return err
	}
	blobs, err := blob.OpenStore(ctx, "file://"+blobDir)
	if err != nil {
		return fmt.Errorf("open the model store: %w", err)
	}
	defer func() { err = errors.Join(err, blobs.Close()) }()

	// The fleet serves the registry's artifacts and checks the registry's models:
	// each sees the other through an interface.
	artifacts := &lateBlobs{}
	nodes := fleet.NewServer(fleet.Config{Name: c.name, Store: store, Blobs: artifacts, Logger: log.With("part", "fleet"), Registerer: reg})
	models := registry.New(registry.Config{Store: store, Blobs: blobs, Checker: nodes, MaxModel: c.maxModel, Logger: log.With("part", "registry")})
	artifacts.Blobs = models

	sched, err := scheduler.New(scheduler.Config{Store: store, Logger: log.With("part", "scheduler"), Registerer: reg})
	if err != nil {
		return err
	}
	handler := guard(api.New(api.Config{
		Store: store, Nodes: callNodes{nodes}, Planner: planner{}, Archives: archives{store}, Models: models,
		Servers: servers{store, c},
		ID:      store.ID(), Name: c.name, Region: c.region, Datacenter: c.datacenter, Version: version,
		Drivers: []string{"onnx", "raw_exec", "exec"},
		Logger:  log.With("part", "api"), Registry: reg,
	}), c.http, func(w http.ResponseWriter, why string) { http.Error(w, why, http.StatusForbidden) })

	rpc := grpc.NewServer(
		grpc.MaxRecvMsgSize(fleet.MaxMessage), grpc.MaxSendMsgSize(fleet.MaxRoutes),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}),
	)
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
	g.Go(func() error { return nodes.Run(ctx) })
	g.Go(func() error { return sched.Run(ctx) })
	g.Go(func() error {
		for leads := range store.LeaderCh(ctx) {
			if !leads { // only a leader is known to have applied all that names a model
				continue
			}
			if err := models.Sweep(ctx); err != nil && ctx.Err() == nil {
				log.Warn("forgotten models could not be deleted", "error", err)
			}
		}
		return nil
	})
	g.Go(func() error { return rpc.Serve(rpcListener) })
	g.Go(func() error { return api.Serve(ctx, httpListener, handler) })
	g.Go(func() error {
		select {
		case err := <-store.Fatal():
			return fmt.Errorf("the store can go on no longer: %w", err)
		case <-ctx.Done():
			return nil
		}
	})
	g.Go(func() error {
		<-ctx.Done()
		rpc.Stop() // agents and gateways go on by themselves and come back
		return nil
	})
	log.Info("server is up", "name", c.name, "http", c.http, "rpc", c.rpc, "raft", c.raft, "version", version)
	return g.Wait()
}

// lateBlobs is the fleet's view of the registry, which is made after the fleet.
type lateBlobs struct{ fleet.Blobs }

// newMetrics is a registry with the process's and Go's own figures.
func newMetrics() *prometheus.Registry {
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return reg
}
