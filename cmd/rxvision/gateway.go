package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	"github.com/rxvision/rxvision/fleet"
	"github.com/rxvision/rxvision/gateway"
	"github.com/rxvision/rxvision/oip"
)

func newGateway() *cobra.Command {
	var (
		c                             gateway.Config
		dataDir, server, addr, logLvl string
	)
	cmd := &cobra.Command{
		Use:   "gateway",
		Short: "Run a gateway: the front door for inference",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := loopbackOnly(map[string]string{"http-addr": addr}); err != nil {
				return err
			}
			log, err := newLogger(cmd.ErrOrStderr(), logLvl)
			if err != nil {
				return err
			}
			if err := os.MkdirAll(dataDir, 0o700); err != nil {
				return fmt.Errorf("data folder: %w", err)
			}
			c.Logger, c.Registry, c.Version, c.RoutesFile = log, newMetrics(), version, filepath.Join(dataDir, "routes.pb")
			return runGateway(cmd.Context(), c, server, addr)
		},
	}
	f := cmd.Flags()
	f.StringVar(&dataDir, "data-dir", filepath.Join(defaultDataDir, "gateway"), "folder where the last routes are kept")
	f.StringVar(&server, "server", defaultRPCAddr, "host:port of a server's gateway listener")
	f.StringVar(&addr, "http-addr", defaultGatewayAddr, "address of the inference API")
	f.Int64Var(&c.MaxBody, "max-body-bytes", gateway.DefaultMaxBody, "largest request or answer")
	f.IntVar(&c.MaxInFlight, "max-in-flight", gateway.DefaultMaxInFlight, "requests answered at once; more get 429")
	f.IntVar(&c.MaxHeld, "max-held", gateway.DefaultMaxHeld, "requests that may wait for a replica; more get 503")
	f.DurationVar(&c.Hold, "hold", gateway.DefaultHold, "how long a request waits for a replica")
	f.DurationVar(&c.Timeout, "timeout", gateway.DefaultTimeout, "of a whole request")
	f.StringVar(&logLvl, "log-level", "info", "debug, info, warn or error")
	return cmd
}

func runGateway(ctx context.Context, c gateway.Config, server, addr string) error {
	host, err := os.Hostname()
	if err != nil {
		host = "gateway"
	}
	c.Name = host
	conn, err := grpc.NewClient(server,
		grpc.WithTransportCredentials(insecure.NewCredentials()), // loopback only
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(fleet.MaxRoutes)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: quickBackoff, MinConnectTimeout: time.Second}),
	)
	if err != nil {
		return err
	}
	defer conn.Close()
	c.Servers = conn
	gw, err := gateway.New(c)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return fmt.Errorf("listen for inference: %w", err)
	}
	srv := gw.HTTPServer()
	srv.Handler = guard(srv.Handler, addr, func(w http.ResponseWriter, why string) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusForbidden)
		_ = json.NewEncoder(w).Encode(oip.ErrorResponse{Error: why}) // the client may be gone
	})
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return gw.Run(ctx) })
	g.Go(func() error {
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		if err := srv.Shutdown(end); err != nil { // requests in flight are answered first
			return srv.Close()
		}
		return nil
	})
	c.Logger.Info("gateway is up", "addr", addr, "server", server, "version", version)
	return g.Wait()
}

// quickBackoff finds a server again soon after it came back.
var quickBackoff = backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second}
