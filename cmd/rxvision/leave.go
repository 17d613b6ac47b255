package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/spf13/cobra"
)

// leaveLimit bounds how long a server that was told to end tries to leave its region.
const leaveLimit = 30 * time.Second

// leaves says whether the signal that ended ctx takes the server out of its region.
func (c serverConfig) leaves(ctx context.Context) bool {
	var s stopSignal
	if !errors.As(context.Cause(ctx), &s) {
		return false
	}
	return s.Signal == os.Interrupt && c.leaveOnInterrupt || s.Signal == syscall.SIGTERM && c.leaveOnTerminate
}

func newServerLeave() *cobra.Command {
	var c clientFlags
	cmd := &cobra.Command{
		Use:   "leave [NAME]",
		Short: "Take a server out of its region; it ends then",
		Long: `Asks the server at --address, or the one of that name, to leave its region: it hands a
leadership over, is taken out of the servers that agree on the state, and ends. It is
refused where the servers that remain could not agree on anything. A server that left
joins again when it is started again. For one that is dead: nomad server force-leave.`,
		Example: "  rxvision server leave\n  rxvision server leave s3",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := c.client()
			if err != nil {
				return err
			}
			who := "the server"
			if len(args) == 1 {
				who = "server " + args[0]
				if c.address, err = client.ServerAddr(cmd.Context(), args[0]); err != nil {
					return err
				}
				if client, err = c.client(); err != nil {
					return err
				}
			}
			if err := client.Leave(cmd.Context()); err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), who+" has left its region and ends")
			return err
		},
	}
	c.add(cmd)
	return cmd
}
